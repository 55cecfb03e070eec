"""Tokenizers of directories against transformers, and chat templates."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from nanoflow.loading.chat_template import ChatTemplate
from nanoflow.tokenizer import Tokenizer
from tiny_models import (
    CHAT_TEMPLATE,
    train_byte_level,
    write_tokenizer,
)
from token_cases import CORPUS, assert_same


@pytest.mark.parametrize(
    "flags",
    [{}, {"add_bos_token": True}, {"add_bos_token": True, "add_eos_token": True}],
)
def test_a_directory_is_read_as_transformers_does(tmp_path: Path, flags: dict[str, bool]) -> None:
    write_tokenizer(tmp_path, **flags)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_dir(tmp_path)
    for text in CORPUS:
        assert_same(ours, theirs, text)
    assert ours.eos_token_ids == (2,)
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_settings_of_training_do_not_cut_prompts(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_dir(tmp_path)
    text = "a long text, longer than four tokens"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_templates_of_older_directories(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    messages = [{"role": "user", "content": "hi"}]
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": CHAT_TEMPLATE}]
    for template in (CHAT_TEMPLATE, named):
        path.write_text(json.dumps(config | {"chat_template": template}))
        prompt = Tokenizer.from_dir(tmp_path).apply_chat_template(messages)
        assert prompt == "<|user|>hi</s>\n<|assistant|>"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="this model has no chat template"):
        Tokenizer.from_dir(tmp_path).apply_chat_template(messages)


def test_a_broken_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer\.json"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a valid tokenizer"):
        Tokenizer.from_dir(tmp_path)
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.from_dir(tmp_path)


def with_template(template: str | None) -> Tokenizer:
    return Tokenizer(
        train_byte_level(),
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        chat_template=template,
    )


def test_templates_find_what_they_expect() -> None:
    template = (
        "{{ bos_token }}{{ strftime_now('%Y') }}{{ messages | tojson(indent=1) }}"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}"
        "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
        "{{ tools is none }}{{ more }}{{ eos_token }}"
    )
    messages = [{"role": "user", "content": "<é>"}, {"role": "user", "content": "b"}]
    expected = f"<s>{datetime.now():%Y}{json.dumps(messages, ensure_ascii=False, indent=1)}<é>"
    assert with_template(template).apply_chat_template(messages, more=7) == expected + "True7</s>"


def test_a_last_message_may_be_continued() -> None:
    tokenizer = with_template("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}!")
    messages = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "b \n"}]

    def prompt(messages: list[dict[str, Any]], **options: Any) -> str:
        options = {"add_generation_prompt": False, "continue_final_message": True, **options}
        return tokenizer.apply_chat_template(messages, **options)

    assert prompt(messages) == "<b><b"
    plain = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    assert prompt(messages, chat_template=plain) == "[b][b \n"
    with pytest.raises(ValueError, match="needs add_generation_prompt=False"):
        prompt(messages, add_generation_prompt=True)
    for content in (None, " "):
        with pytest.raises(ValueError, match="cannot be continued"):
            prompt([{"role": "assistant", "content": content}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "cannot render"),
        ("{{ messages.append(1) }}", "cannot render"),
        ("{{ messages + 1 }}", "cannot render"),
    ],
)
def test_a_template_may_refuse_but_not_escape(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_template(template).apply_chat_template([{"role": "user", "content": "hi"}])


def test_a_broken_template_is_told_at_once() -> None:
    with pytest.raises(ValueError, match="the chat template is not valid"):
        with_template("{% for %}")
