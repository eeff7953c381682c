"""The check of the project's prose: the texts that it reads, and the offences that it finds."""

from __future__ import annotations

import prose

MODULE = '''"""What it does.

Sentences.
"""

lane = "box"  # a stranger
MESSAGE = f"the box of {lane}"


def seat() -> None:
    """Returns the seat."""
'''


def test_docstrings_comments_and_messages_of_a_module_are_prose_and_its_names_and_keys_are_not() -> None:
    found = sorted(one for piece in prose.of_python(MODULE) for one in prose.own_offences(piece))
    assert found == [
        (1, "a docstring that opens with 'What': write a sentence with subject and verb"),
        (6, "'stranger': write unauthenticated connections, unknown devices"),
        (7, "'box': write encrypted share"),
        (11, "'seat': write client index"),
    ]


def test_code_and_links_in_a_document_are_not_prose() -> None:
    text = "# `lane`\n\n```bash\nboxes\n```\n\n[a](greeting.md) greeting\n"
    (piece,) = prose.of_markdown(text)
    assert list(prose.own_offences(piece)) == [(7, "'greeting': write registration, registers")]


def test_proselint_reads_whole_words() -> None:
    prose.register()
    offending, fine = prose.Prose(3, "It waits for ever.\n"), prose.Prose(3, "It waits for everybody.\n")
    assert list(prose.proselint_offences(offending)) == [(3, "'for ever' is archaic.")]
    assert not list(prose.proselint_offences(fine))
