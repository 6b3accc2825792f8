"""Signals that would hold nothing: named before the teacher runs."""

from signal_store.errors import InputError
from signal_store.format.manifest import Capacities
from signal_store.signals import Signals


def refuse_empty_signals(signals: Signals, needs: Capacities) -> None:
    """InputError for a signal that no text of the plan gives a row; `needs`: the most rows of any unit."""
    if signals.attention is not None and needs.attention_entries <= 1:
        raise InputError(
            "no keyword was found for the attention signal",
            expected="a source whose keywords are found, and some in its text",
            found="none",
            remedy="Give sources a lexer (prose: a tagger with keywords: true), or leave signals.attention out.",
        )
    if signals.hidden is not None and signals.hidden.positions == "keywords" and needs.hidden_rows <= 1:
        raise InputError(
            "no keyword was found for the hidden signal's positions",
            expected="a source whose keywords are found, and some in its text",
            found="none",
            remedy="Give sources a lexer (prose: a tagger with keywords: true), or take other positions.",
        )
    if signals.replay is not None and needs.replay_rows <= 1:
        raise InputError(
            "no text ends as the model would end it, so the replay signal has no position",
            expected="append_eos, or chats that end with the assistant",
            found="none",
            where="signals.replay",
        )
    for name, needed, task in (("evidence", needs.evidence_rows, "qa"), ("coverage", needs.coverage_rows, "summary")):
        if getattr(signals, name) is not None and not needed:
            raise InputError(
                f"the {name} signal has nothing to look at",
                expected=f"a source with task: {task} whose prompts hold "
                + ("two sentences" if task == "qa" else "nouns or names"),
                found="none",
                where=f"signals.{name}",
            )
