"""Chat templates: what published ones use, and what they may not do."""

import pytest

from dualpipe_jax.tokens.chat import ChatTemplate

USER = [{"role": "user", "content": "<é> & 'x'"}]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        # Blocks leave no lines of their own, as in transformers.
        ("  {% if true %}\nA\n  {% endif %}\nB", "A\nB"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é> & \'x\'"}]'),
        ("{% generation %}A{% endgeneration %}", "A"),
        ("{% for m in [1, 2, 3] %}{{ m }}{% break %}{% endfor %}", "1"),
        ("{{ bos_token }}{{ missing }}{% if tools %}T{% endif %}", "<s>"),
        ("{% set ns = namespace(n=0) %}{% set ns.n = 2 %}{{ ns.n }}", "2"),
        ("{{ 'yes' if strftime_now('%Y') | int > 2000 }}", "yes"),
    ],
)
def test_published_templates_can_use(source, text):
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(USER) == text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "refuses"),
        ("{{ ''.__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}", "refuses"),
        ("{% for i in range(10**9) %}{% endfor %}", "refuses"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% include 'file' %}", "refuses"),
    ],
)
def test_what_a_template_refuses_or_may_not_do(source, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate(source, {}).render(USER)


@pytest.mark.parametrize(
    "messages", [[], "text", [{"role": "user"}], [{"role": 1, "content": ""}], [1]]
)
def test_messages_have_a_role_and_content(messages):
    with pytest.raises(ValueError, match="objects with role and content"):
        ChatTemplate("", {}).render(messages)
