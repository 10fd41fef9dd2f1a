"""What pages are made of: the frame, tables, and text that stays text whatever it holds."""

import json
import os
from html import escape
from pathlib import Path

from zerotune.run.report.charts import number

STYLE = Path(__file__).with_name("page.css")
SHOWN_CHARACTERS = 2000
# Nothing is loaded and nothing runs, whatever a prediction or a file name holds: escaping is the first lock, this the second.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(title, parts):
    """Return a whole HTML page; parts: pieces of HTML, empty ones are left out."""
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{STYLE.read_text()}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def write_page(path, content):
    """Write a page so that a reader sees the old or the new one, never a part; a failure leaves the old one."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(content.encode("utf-8", "replace"))  # a flag may hold half a character, which has no bytes in UTF-8
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def text(value):
    """Return a value as escaped text, without its end if it is very long."""
    words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return escape(words if len(words) <= SHOWN_CHARACTERS else f"{words[:SHOWN_CHARACTERS]} ... ({len(words):,} characters)")


def table(head, rows, caption=""):
    """Return an HTML table. Cells: text, numbers (set to the right), None, or what JSON has; a row's first is its name."""
    lines = [f"<caption>{text(caption)}</caption>"] if caption else []
    heads = "".join(f'<th scope="col">{text(cell)}</th>' for cell in head)
    lines.append(f"<thead><tr>{heads}</tr></thead><tbody>")
    for name, *cells in rows:
        lines.append(f'<tr><th scope="row">{text(name)}</th>{"".join(map(cell_of, cells))}</tr>')
    return f'<div class="wide"><table>{"".join(lines)}</tbody></table></div>'


def cell_of(value):
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return f'<td class="count">{number(value)}</td>'
    return f"<td>{text('-' if value is None else value)}</td>"


def section(title, *parts):
    """Return a headline with what is under it, '' if that is nothing."""
    content = "".join(parts)
    return f"<section><h2>{text(title)}</h2>{content}</section>" if content else ""


def folded(summary, content):
    """Return HTML behind a line that opens it."""
    return f"<details><summary>{text(summary)}</summary>{content}</details>" if content else ""
