"""A smaller data set out of another: some of its training rows, and its dev rows or other training rows to measure on.

Learning rates are chosen on a slice whose dev part is of training rows too, so that nothing is chosen by the dev rows:

    python -m bench.slices demo runs/slice --rows 2000 --dev-rows 1000  # to learn from, and others to choose by
    python -m bench.slices path/to/sst2 runs/sst2 --rows 10000  # to learn from, and SST-2's own dev rows
    python -m bench.slices path/to/e2e runs/e2e --rows 640 --dev-rows 160 --e2e  # of E2E's files, as distributed

What reads scores there is to be given --problem-type regression: those of a slice may all be whole, as classes are.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from bench.evidence import e2e
from bench.harness import option_parser
from fastpeft.comparison.learning_rates import take_slice, write_rows
from fastpeft.data.examples import TextData, load_data
from fastpeft.data.problems import NEXT_WORDS


def whole_e2e(folder: Path) -> TextData:
    """E2E's rows as next words, given the folder of its files."""
    with TemporaryDirectory() as rows:
        e2e(folder, Path(rows))
        return load_data(rows, problem_type=NEXT_WORDS.name)


def main() -> None:
    parser = option_parser(__doc__)
    parser.add_argument("data", help="as for fastpeft train --data")
    parser.add_argument("folder", type=Path, help="where to write train.jsonl and dev.jsonl")
    parser.add_argument("--rows", type=int, required=True, help="training rows to take")
    parser.add_argument("--dev-rows", type=int, help="other training rows to measure on (default: the dev rows)")
    parser.add_argument("--e2e", action="store_true", help="`data` is the folder of E2E's files, as distributed")
    arguments = parser.parse_args()
    whole = whole_e2e(Path(arguments.data)) if arguments.e2e else load_data(arguments.data)
    write_rows(take_slice(whole, arguments.rows, arguments.dev_rows), arguments.folder)


if __name__ == "__main__":
    main()
