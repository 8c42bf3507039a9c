"""Runs as one HTML page and a Markdown table: `python -m megatron_gkd.report RUN [RUN ...]`, each
the --output_dir of a run, finished or still going. Nothing is fetched, neither now nor by the page.
"""

import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from megatron_gkd.flags import Parser, exit_with, refuse_unknown
from megatron_gkd.report.markdown import make_markdown
from megatron_gkd.report.page import make_page
from megatron_gkd.report.read import read_runs
from megatron_gkd.run_folder import write_atomically


def write_report(folders: Sequence[str], output: str | None) -> tuple[Path, Path]:
    """The paths of the page and of the table, once they are written. output: of the page; None:
    report.html in the folder of a single run, of several in the current one. Raises ValueError or
    OSError.
    """
    records = read_runs(folders)
    page = Path(output or Path(folders[0] if len(folders) == 1 else ".", "report.html"))
    if page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {page}: must be the name of an .html file")
    made, table = datetime.now(), page.with_suffix(".md")
    page.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(page, make_page(records, made))
    write_atomically(table, make_markdown(records, made))
    return page, table


def main(argv: Sequence[str]) -> None:
    """Write both files and say where. A mistake ends it with one line and exit status 2."""
    parser = Parser(prog="python -m megatron_gkd.report", description=" ".join(__doc__.split()))
    parser.add_argument("runs", nargs="+", metavar="RUN", help="A run's --output_dir.")
    parser.add_argument(
        "--output",
        metavar="FILE.html",
        help="The page; the table goes beside it as FILE.md. None: RUN/report.html, of several "
        "runs ./report.html.",
    )
    try:
        refuse_unknown(argv, parser)
        settings = parser.parse_args(argv)
        page, table = write_report(settings.runs, settings.output)
    except (ValueError, OSError) as error:
        exit_with(error)
    print(f"{page}\n{table}")


if __name__ == "__main__":
    main(sys.argv[1:])
