"""The run of `seats ask` about files that were named: answer one by one, show what each cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from seats_cli.batch.output import heading
from seats_cli.batch.sources import check_file
from seats_cli.cli import options as opt
from seats_cli.cli.console import Terminal
from seats_cli.cli.loading import open_session, say_whose_answers
from seats_cli.errors import MediaError, SeatsError, UsageError, unexpected

if TYPE_CHECKING:
    from seats_cli.session import Answer, Session


@dataclass(frozen=True)
class Request:
    """One call of `seats ask`, checked. `model` and `asked` are keywords of ModelOptions and AskOptions."""

    media: tuple[str, ...]
    question: str
    model: Mapping[str, Any]
    asked: Mapping[str, Any]
    as_json: bool
    stats: bool
    compare: bool
    limits: Mapping[str, Any] = field(default_factory=dict)  # keywords of media.Limits


def answer_all(terminal: Terminal, request: Request) -> int:
    """Answer file by file; one that fails is told on stderr, then comes the next. Returns the exit code."""
    failures = {path: problem for path in request.media if (problem := problem_of(path)) is not None}
    session = None
    if len(failures) < len(set(request.media)):  # else nothing needs the model, nor torch
        session = open_session(terminal, request.model, request.limits)
        check_for_all(session, request.asked)
        say_whose_answers(terminal, is_embedded=session.is_embedded, random_weights=session.random_weights)
    results: list[dict[str, Any]] = []
    code = 0
    several = len(request.media) > 1
    try:
        for path in request.media:
            terminal.subject = path if several else None
            try:
                if session is None or path in failures:
                    raise failures[path]
                results.append(answer_one(terminal, session, request, path, header=several))
            except (UsageError, BrokenPipeError):
                raise
            except Exception as error:
                shown = error if isinstance(error, SeatsError) else unexpected(error)
                terminal.end_answer()
                terminal.error(shown, about=path)
                results.append(failure_record(path, request.question, shown))
                code = 1 if several else shown.exit_code
    finally:  # also after Ctrl-C: what is done is kept
        if request.as_json and results:
            whole = {"schema_version": opt.SCHEMA_VERSION, "results": results}
            terminal.document(whole if several else results[0])
    return code


def check_for_all(session: "Session", asked: Mapping[str, Any]) -> None:
    """Raise what is wrong with the options whatever the file, such as a preset made for another model."""
    from seats_cli.session import AskOptions

    session.setup(AskOptions(**asked))


def problem_of(path: str) -> MediaError | None:
    """What `check_file` has against a file."""
    try:
        check_file(path)
    except MediaError as error:
        return error
    return None


def failure_record(path: str, question: str, error: SeatsError) -> dict[str, Any]:
    """The JSON of a file that could not be answered."""
    return {
        "schema_version": opt.SCHEMA_VERSION,
        "media": {"path": path},
        "question": question,
        "error": {"kind": error.kind, "message": str(error), "hint": error.hint},
    }


def answer_one(
    terminal: Terminal, session: "Session", request: Request, path: str, *, header: bool
) -> dict[str, Any]:
    """Answer about one file: the words to stdout, the table to stderr. Returns the JSON of the report."""
    from seats_cli.cli.tables import report_tables
    from seats_cli.session import AskOptions

    asked = AskOptions(**request.asked)
    if request.compare:  # whatever runs first pays for starting up; let it be a run that does not count
        run_hidden(
            terminal, session, path, request.question, AskOptions(**{**request.asked, "max_new_tokens": 2})
        )
    above = heading(path) if header else ""

    def show(text: str) -> None:
        nonlocal above  # comes with the first word: a file that fails has none
        terminal.answer_piece(above + text)
        above = ""

    streamed = terminal.streams_answers and not request.as_json
    with terminal.progress() as on_stage:
        answer = session.ask(
            path, request.question, asked, on_text=show if streamed else None, on_stage=on_stage
        )
    if not request.as_json:
        show("" if streamed else f"{answer.text}\n")
        terminal.end_answer()
    if answer.report.tokens.finish_reason == "length":
        terminal.warn(f"the answer was cut off at --max-new-tokens {request.asked['max_new_tokens']}")
    elif not answer.text.strip():
        terminal.warn("the model ended its answer without a word")
    record = answer.report.to_json()
    full = None
    if request.compare:
        everything = AskOptions(**{**request.asked, "method": "full", "ratio": 1.0})
        full = run_hidden(terminal, session, path, request.question, everything)
        record = {**record, "full": full.report.to_json()}
    if request.stats or (request.compare and not (request.as_json or terminal.quiet)):
        for table in report_tables(answer.report, full.report if full is not None else None):
            terminal.table(table)
        if full is not None and full.text != answer.text:
            terminal.note(f"with all tokens: {full.text}")
    return record


def run_hidden(terminal: Terminal, session: "Session", path: str, question: str, asked: Any) -> "Answer":
    """An answer whose words are not shown: the other side of a comparison."""
    with terminal.progress() as on_stage, terminal.hushed():
        return session.ask(path, question, asked, on_stage=on_stage)
