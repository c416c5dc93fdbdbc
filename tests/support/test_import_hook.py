"""Something is done when another module is imported."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fastpeft.support.import_hook import import_when_used, import_without, when_imported


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that can be imported: `hooked_outer` imports `hooked_inner`, `hooked_broken` fails."""
    (tmp_path / "hooked_inner.py").write_text("done = []\n")
    (tmp_path / "hooked_outer.py").write_text("import hooked_inner\nseen = list(hooked_inner.done)\n")
    (tmp_path / "hooked_broken.py").write_text("raise ImportError('as before')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in ("hooked_inner", "hooked_outer", "hooked_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("modules")
def test_at_once_where_it_is_imported_already() -> None:
    done, before = [], list(sys.meta_path)
    import hooked_inner  # noqa: F401

    when_imported({"hooked_inner": lambda: done.append("inner")})
    assert done == ["inner"]
    assert sys.meta_path == before


@pytest.mark.usefixtures("modules")
def test_after_the_outermost_import() -> None:
    """While one library imports another, neither is whole."""
    before = list(sys.meta_path)

    def act(name: str) -> None:
        sys.modules["hooked_inner"].done.append(name)

    when_imported({name: lambda name=name: act(name) for name in ("hooked_outer", "hooked_inner")})
    import hooked_outer

    assert hooked_outer.seen == []
    assert hooked_outer.hooked_inner.done == ["hooked_inner", "hooked_outer"]
    assert sys.meta_path == before
    for module in (hooked_outer, hooked_outer.hooked_inner):
        assert "exec_module" not in vars(module.__spec__.loader)


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("error", [ImportError, AttributeError])
def test_the_import_of_others_does_not_fail_by_ours(error: type[Exception]) -> None:
    def act() -> None:
        raise error("'gone' is gone")

    when_imported({"hooked_inner": act})
    with pytest.warns(UserWarning, match="fastpeft does not fit the hooked_inner that is installed: 'gone' is gone"):
        import hooked_inner
    assert hooked_inner.done == []


@pytest.mark.usefixtures("modules")
def test_a_failed_import_is_none() -> None:
    done: list[str] = []
    when_imported({"hooked_broken": lambda: done.append("broken")})
    for _ in range(2):
        with pytest.raises(ImportError, match="as before"):
            import hooked_broken  # noqa: F401
    assert done == []


@pytest.mark.usefixtures("modules")
def test_an_import_is_delayed_until_something_is_used() -> None:
    import_when_used("hooked_inner")
    import hooked_outer  # which uses it

    assert hooked_outer.seen == []
    for name in ("hooked_inner", "hooked_outer"):
        del sys.modules[name]
    import hooked_inner

    assert type(hooked_inner).__name__ == "_LazyModule"
    assert hooked_inner.done == []
    assert type(hooked_inner).__name__ == "module"


def test_an_optional_import_of_one_module_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optional = "try:\n    import hooked_optional as found\nexcept ImportError:\n    found = None\n"
    for name, text in {"hooked_optional": "", "hooked_light": optional, "hooked_other": optional}.items():
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    import_without("hooked_light", "hooked_optional")
    import hooked_light  # type: ignore[import-not-found]
    import hooked_other  # type: ignore[import-not-found]

    assert hooked_light.found is None
    assert hooked_other.found.__name__ == "hooked_optional"
