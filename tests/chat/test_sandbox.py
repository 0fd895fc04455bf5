"""Templates are programs from the internet: the broken and the hostile ones give one clear error."""

from datetime import datetime

import pytest

from hybrid.chat.template import ChatTemplate
from hybrid.errors import CheckpointError, KimiError

HELLO = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ messages[0]['__class__'] }}",
        "{{ ''['__class__'] }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ ('{0.__cla' ~ 'ss__}').format(messages) }}",
        "{{ messages | attr('__class__') }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__code__ }}",
        "{{ range.left.__class__ }}",
        "{% set _ = messages.append(1) %}",
        "{% set _ = messages[0].update(role='system') %}",
        "{% set _ = messages.clear() %}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% for i in range(10 ** 30) %}{% endfor %}",
        "{% for i in range(9000) %}{% for j in range(9000) %}{% for k in range(9000) %}{% endfor %}"
        + "{% endfor %}" * 2,
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'x' * 10 ** 15 }}",
        "{{ 1 / 0 }}",
        "{{ messages[5].content.x }}",
        "{{ messages[0].nothing.at_all }}",
        "{{ nothing() }}",
        "{{ 1 + 'a' }}",
        "{{ messages | tojson(indent='a', separators=5) }}",
        "{{ (1, 2) | tojson | nosuchfilter }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends 'x' %}",
        "{% if %}",
        "{% for m in messages %}",
        "{{ messages",
        "{% generation %}x",
        "(" * 500 + "{{ " + "(" * 5_000 + "1" + ")" * 5_000 + " }}",
    ],
)
def test_bad_templates(source: str) -> None:
    with pytest.raises(CheckpointError, match="The chat template of /models/x") as error:
        ChatTemplate(source, origin="/models/x").render(HELLO)
    assert error.value.exit_code == 4
    assert "chat_template.jinja" in error.value.remedy
    assert len(str(error.value)) < 500 and "\n" not in str(error.value)


def test_the_line_of_a_mistake_is_named() -> None:
    with pytest.raises(CheckpointError, match="of /models/x, line 3"):
        ChatTemplate("a\nb\n{% if %}", origin="/models/x")


def test_a_template_may_refuse_a_conversation() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(KimiError, match="roles must alternate") as error:
        template.render(HELLO)
    assert error.value.exit_code == 1


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% if true %}\n  a\n  {% endif %}\nb\n", "  a\nb"),
        ("{{ {'b': 'é<&>', 'a': [1, none]} | tojson }}", '{"b": "é<&>", "a": [1, null]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(separators=(',', ':'), sort_keys=true) }}", '{"a":2,"b":1}'),
        ("{{ {'a': 'é'} | tojson(ensure_ascii=true, indent=1) }}", '{\n "a": "\\u00e9"\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% break %}{% endfor %}", "0"),
        ("{% for i in range(9) %}{% if i < 7 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "78"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{{ tools is none }}{{ thinking is true }}{{ add_generation_prompt }}", "TrueTrueTrue"),
        ("{{ '<b>' }}{{ messages[0]['content'] }}", "<b>hi"),
        ("{% for i in range(1000) %}{% for j in range(900) %}{% endfor %}{% endfor %}done", "done"),
    ],
)
def test_the_settings_templates_expect(source: str, text: str) -> None:
    assert ChatTemplate(source).render(HELLO) == text


def test_the_date() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(HELLO) in {str(datetime.now().year + i) for i in (-1, 0)}


def test_the_limit_is_for_one_rendering() -> None:
    template = ChatTemplate("{% for i in range(90000) %}{% endfor %}x")
    assert {template.render(HELLO) for _ in range(15)} == {"x"}
