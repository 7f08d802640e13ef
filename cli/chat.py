"""``uora chat``"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cli.client import connect
from cli.errors import CliError, explain
from cli.output import complain, console, printable, say

if TYPE_CHECKING:
    from openai import OpenAI

Messages = list[dict[str, str]]


def chat(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="A base model, or ft:...")],
    prompt: Annotated[str | None, typer.Argument(help="A single question; else what comes from a pipe.")] = None,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer.")] = None,
    temperature: Annotated[float | None, typer.Option(min=0, max=2)] = None,
    compare_base: Annotated[
        bool, typer.Option("--compare-base", help="Show what the base model says beside it.")
    ] = False,
) -> None:
    """Talk with a model: a question at a time, or one alone. Ctrl-D ends it."""
    client = connect(ctx)
    models = [model, base_of(client, model)] if compare_base else [model]
    given = {"max_tokens": max_tokens, "temperature": temperature}
    talk = Talk(client, models, system, {name: value for name, value in given.items() if value is not None})
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
        if not prompt:
            raise CliError("Nothing came from the pipe; expected a question.")
    if prompt is not None:
        talk.ask(prompt)
        return
    client.models.retrieve(model)  # a wrong name is told before the first question
    say("Ctrl-D ends it.")
    for question in _questions():
        _ask_and_go_on(talk, question)


def base_of(client: OpenAI, model: str) -> str:
    """The base model of a fine-tuned one; raises ``CliError`` for a base model."""
    found: Any = client.models.retrieve(model)
    if found.root == model:
        raise CliError(f"{model} is a base model; --compare-base compares a fine-tuned model with its own.")
    return str(found.root)


class Talk:
    """A conversation with one model, or the same one with two."""

    def __init__(self, client: OpenAI, models: list[str], system: str | None, options: dict[str, Any]) -> None:
        self._client = client
        self._options = options
        first: Messages = [{"role": "system", "content": system}] if system else []
        self._said: dict[str, Messages] = {model: [*first] for model in models}

    def ask(self, question: str) -> None:
        """Print the answer as it comes. What broke off is as if it was never asked."""
        asked = {"role": "user", "content": question}
        streams = {model: self._stream(model, [*said, asked]) for model, said in self._said.items()}
        if len(streams) == 1:
            answers = {model: _print_stream(stream) for model, stream in streams.items()}
        else:
            answers = _print_beside(streams)
        for model, answer in answers.items():
            self._said[model] += [asked, {"role": "assistant", "content": answer}]

    def _stream(self, model: str, messages: Messages) -> Iterator[str]:
        written: Any = messages  # plain dicts, as the API has them
        with self._client.chat.completions.create(
            model=model, messages=written, stream=True, **self._options
        ) as stream:
            for chunk in stream:
                if chunk.choices and chunk.choices[0].delta.content:
                    yield chunk.choices[0].delta.content


def _print_stream(stream: Iterator[str]) -> str:
    answer = ""
    try:
        for piece in stream:
            answer += piece
            typer.echo(printable(piece), nl=False)
            sys.stdout.flush()
    finally:
        if answer:
            typer.echo()
    return answer


def _print_beside(streams: dict[str, Iterator[str]]) -> dict[str, str]:
    """A column for each model, which grow together."""
    answers = dict.fromkeys(streams, "")
    with Live(_columns(answers), console=console(), auto_refresh=False, vertical_overflow="visible") as live:
        for pieces in zip_longest(*streams.values(), fillvalue=""):
            answers = {model: answers[model] + piece for model, piece in zip(answers, pieces, strict=True)}
            live.update(_columns(answers), refresh=True)
    return answers


def _columns(answers: dict[str, str]) -> Table:
    table = Table(*answers)
    table.add_row(*(Text(printable(answer)) for answer in answers.values()))
    return table


def _questions() -> Iterator[str]:
    with suppress(ImportError):
        import readline  # noqa: F401 - lets input() have a history
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if question:
            yield question


def _ask_and_go_on(talk: Talk, question: str) -> None:
    """An answer that fails, or is interrupted, does not end the conversation."""
    try:
        talk.ask(question)
    except KeyboardInterrupt:
        say("Interrupted; the question is forgotten.")
    except Exception as error:
        text = explain(error)
        if text is None:
            raise
        complain(text)
