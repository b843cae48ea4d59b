"""Chat templates: the Jinja programs by which published models write conversations.

They come from others, so they run in Jinja's sandbox, which lets them neither import
nor change anything.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any

from dualpipe_jax.tokens.plain import Messages


class ChatTemplate:
    """A chat template, as Hugging Face's tokenizers have them.

    Args:
      source: the template.
      tokens: special tokens by name, such as `bos_token`.

    Raises:
      ValueError: the template does not parse.

    Examples:
      >>> template = ChatTemplate(
      ...     "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
      ...     "{% if add_generation_prompt %}<assistant>{% endif %}", {}
      ... )
      >>> template.render([{"role": "user", "content": "Hello"}])
      '<user>Hello<assistant>'
    """

    def __init__(self, source: str, tokens: Mapping[str, str]):
        import jinja2

        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template does not parse ({error}).") from error
        self._tokens = dict(tokens)

    def render(self, messages: Messages, *, add_generation_prompt: bool = True) -> str:
        """Writes a conversation.

        Args:
          messages: each with `role` and `content`.
          add_generation_prompt: whether the model's reply comes next.

        Raises:
          ValueError: the template refuses the messages, or fails.
        """
        import jinja2

        check_messages(messages)
        values: dict[str, Any] = self._tokens | {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        # A template is a program: it may also divide by zero.
        errors = (jinja2.TemplateError, ArithmeticError, LookupError, TypeError)
        try:
            return self._template.render(values)
        except (*errors, AttributeError, ValueError) as error:
            raise ValueError(
                f"the chat template refuses these messages ({error})."
            ) from error


def check_messages(messages: Any) -> None:
    """Raises a ValueError unless these are messages with role and content."""
    is_list = isinstance(messages, list | tuple) and bool(messages)
    for message in messages if is_list else [None]:
        given = message if isinstance(message, Mapping) else {}
        if not all(isinstance(given.get(name), str) for name in ("role", "content")):
            raise ValueError(
                f"messages={str(messages)[:60]!r} must be a list of objects with role "
                "and content, both text."
            )


def _environment() -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """`{% generation %}`, which marks replies for training: what is inside."""

        tags = {"generation"}  # noqa: RUF012  as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        # Jinja's own escapes HTML.
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
    }
    return environment
