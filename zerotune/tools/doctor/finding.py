"""What a check comes to: a verdict, what was found, and the fix."""

from dataclasses import dataclass

VERDICTS = ("fine", "will hurt", "will fail")  # a verdict's place is the exit code


@dataclass(frozen=True)
class Finding:
    verdict: str
    check: str  # what was looked at, a word or two
    found: str
    fix: str = ""


def fine(check, found):
    return Finding("fine", check, found)


def hurts(check, found, fix):
    return Finding("will hurt", check, found, fix)


def fails(check, found, fix):
    return Finding("will fail", check, found, fix)


def of_problem(check, problem):
    """Return the "will fail" of a UserError's line, which says what is wrong before its first semicolon and what to do after it."""
    found, _, fix = problem.partition("; ")
    return fails(check, found, fix or "correct what is named; python train.py --help lists what is allowed")


def exit_code(findings):
    """Return 0 if all is fine, 1 if something will hurt, 2 if something will fail."""
    return max((VERDICTS.index(finding.verdict) for finding in findings), default=0)


def report(findings):
    """Return the text of findings, the worst last, where a terminal's reader looks first."""
    lines = []
    for verdict in VERDICTS:
        if group := [finding for finding in findings if finding.verdict == verdict]:
            lines.append(f"{verdict} ({len(group)})")
        for finding in group:
            lines.append(f"  {finding.check}: {finding.found}")
            lines += [f"      fix: {finding.fix}"] if finding.fix else []
    return "\n".join(lines)
