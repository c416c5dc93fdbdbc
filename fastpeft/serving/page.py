"""The page that shows a server's OpenAPI description. FastAPI's own would load its script from another host."""

from __future__ import annotations

import json
from html import escape
from typing import Any

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:50rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "pre{overflow:auto;padding:.7rem;border:1px solid #888}"
)


def page(description: dict[str, Any]) -> str:
    """The HTML page of an OpenAPI description: each path, what it takes and gives, and the schemas."""
    parts = []
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            said = "".join(
                f"<li>{escape(status)}: {escape(answer['description'])}</li>"
                for status, answer in operation["responses"].items()
            )
            parts.append(
                f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
                f"<p>{escape(operation.get('description', ''))}</p><ul>{said}</ul>"
            )
    schemas = escape(json.dumps(description["components"]["schemas"], indent=2))
    title = escape(description["info"]["title"])
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        f"<h1>{title}</h1><p>{escape(description['info']['description'])}</p>"
        '<p>For programs: <a href="openapi.json">openapi.json</a>.</p>'
        f'{"".join(parts)}<h2>Schemas</h2><pre tabindex="0">{schemas}</pre></html>'
    )
