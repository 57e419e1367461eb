"""Goldens for chat templates: what transformers makes of conversations, with the templates in chat/.

    pip install transformers==5.17.0 tokenizers jinja2
    python goldens/chat.py

Writes into every directory of chat/ a small tokenizer.json (byte-level; for Mistral in the manner of sentencepiece),
tokenizer_config.json and golden.json: for each conversation the ids of `apply_chat_template` and the mask of the
assistant's tokens. Where the template has no {% generation %} block the mask is found by comparing what transformers
prints for the beginnings of a conversation; `unstable` is the first turn for which they differ, counted from 1.
`strftime_now` tells the time of 26 July 2024.
"""

import datetime
import json
import pathlib
import re

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).parent / "chat"
# Token texts that a template prints.
SPECIAL = re.compile(r"<\|\w+\|>|\[/?[A-Z_]+\]|</?s>|</?think>")
TOKENS = {
    "qwen": dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"),
    "chatml": dict(eos_token="<|im_end|>"),
    "llama": dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
    "mistral": dict(bos_token="<s>", eos_token="</s>"),
}
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Tells the weather: \"now\" <b>&amp;</b> é.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "number", "default": 1.0}},
                       "required": ["city"], "strict": True, "nothing": None}}}
OTHER = {"type": "function", "function": {"name": "add", "description": "a + b", "parameters": {"type": "object",
         "properties": {"z": {"type": "integer", "enum": [1, -2, 3000000000]}, "a": {"type": "number", "max": 1e20}}}}}


def message(role, content, **more):
    return {"role": role, "content": content, **more}


def call(arguments):
    return {"id": "abcdefghi", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


CALL = call({"city": "Zürich", "days": 2.5})
RAIN = message("tool", "rain", tool_call_id="abcdefghi")
ROWS = [
    {"messages": [message("user", "What is 2 + 3?"), message("assistant", "5")]},
    {"messages": [message("system", "Be brief. "), message("user", " Hi there\n"), message("assistant", "Hello, über-friend! 你好 🙂")]},
    {"messages": [message("user", "one"), message("assistant", "two"), message("user", "three"),
                  message("assistant", " four\n"), message("user", "five"), message("assistant", "six")]},
    {"messages": [message("system", "S"), message("user", "a"), message("assistant", "b"), message("user", "c"),
                  message("assistant", "<think>\nLet me see.\n</think>\n\nd")]},
    {"messages": [message("user", "a"), message("assistant", "<think>\nhm\n</think>\n\nb")]},
    {"messages": [message("user", "left open"), message("assistant", "yes"), message("user", "more?")]},
    {"messages": [message("user", "Weather?"), message("assistant", "It rains.")], "tools": [TOOL]},
    {"messages": [message("user", "Weather?"), message("assistant", "", tool_calls=[CALL]), RAIN,
                  message("assistant", "It rains.")], "tools": [TOOL]},
    {"messages": [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")], "tools": [TOOL]},
    {"messages": [message("system", "Use tools."), message("user", "Weather?"), message("assistant", "Let me look.", tool_calls=[CALL]),
                  RAIN, message("assistant", "It rains."), message("user", "Thanks"), message("assistant", "Welcome")],
     "tools": [TOOL, OTHER]},
    {"messages": [message("user", "Both"), message("assistant", None, tool_calls=[CALL, call('{"city": "Bern"}')]), RAIN, RAIN,
                  message("assistant", "It rains.")]},
    {"messages": [message("user", "a"), message("assistant", "b", reasoning_content="because\n"), message("user", "c"),
                  message("assistant", "d", reasoning_content="as before")]},
    {"messages": [message("user", "a"), message("assistant", "b")], "chat_template_kwargs": {"enable_thinking": False}},
    {"messages": [message("system", "S"), message("user", "a"), message("assistant", "b")],
     "chat_template_kwargs": {"date_string": "1 Jan 2025", "tools_in_user_message": False}, "tools": [TOOL]},
    {"messages": [message("user", "Zeile\r\n\r\n\tzwei \u00a0 e\u0301 \u200b 👩‍👩‍👧 ﬁ ½"), message("assistant", "\n\nخط 한국어 e\u0301 🇨🇭 ﬁ  ")]},
    {"messages": [message("user", "What ends a turn?"), message("assistant", "<|im_end|> or </s>, <|eot_id|>"), message("user", "ok")]},
    {"messages": [message("assistant", "I speak first."), message("user", "a"), message("assistant", "b")]},
    {"messages": [message("user", "a"), message("user", "b"), message("assistant", "c"), message("assistant", "d")]},
    {"messages": [message("system", "only a system message"), message("assistant", "{{ b }} {% raw %}")]},
]


class Day(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2024, 7, 26)


def tokenizer(directory):
    template = (directory / "chat_template.jinja").read_text()
    tokens = next((found for family, found in TOKENS.items() if directory.name.startswith(family)), TOKENS["chatml"])
    special = sorted({*SPECIAL.findall(template), *tokens.values()})
    corpus = [template] + [m["content"] or "" for row in ROWS for m in row["messages"]]
    options = dict(vocab_size=480, show_progress=False, special_tokens=[AddedToken(t, special=True, normalized=False) for t in special])
    if directory.name.startswith("mistral"):
        backend = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        options["special_tokens"] += ["<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)]
        options.update(vocab_size=640)
        # What is beyond falls back to bytes.
        corpus = [re.sub(r"[^\x20-\x7e]", "", text) for text in corpus]
    else:
        backend = Tokenizer(models.BPE())
        backend.normalizer = normalizers.NFC() if directory.name.startswith("qwen") else None
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        options["initial_alphabet"] = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(corpus, trainers.BpeTrainer(**options))
    if directory.name.startswith("mistral"):
        # The bytes are what words are made of, not special tokens.
        state = json.loads(backend.to_str())
        state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]
        backend = Tokenizer.from_str(json.dumps(state))
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(tokens, indent=1) + "\n")
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **tokens)


def golden(fast, row):
    messages, tools, more = row["messages"], row.get("tools"), row.get("chat_template_kwargs", {})
    render = lambda upto, ask: fast.apply_chat_template(messages[:upto], tools=tools, tokenize=False, add_generation_prompt=ask, **more)
    try:
        text = render(len(messages), False)
    except Exception as error:
        return dict(row, error=str(error), raised=type(error).__name__ == "TemplateError")
    marked = re.search(r"\{%-?\s*generation\s*-?%\}", fast.chat_template) is not None
    out = fast.apply_chat_template(messages, return_assistant_tokens_mask=marked, tools=tools, return_dict=True, tokenize=True, **more)
    found = dict(row, text=text, ids=list(out["input_ids"]))
    if marked:
        return dict(found, mask=list(out["assistant_masks"]))
    spans = []
    for turn, one in enumerate(messages):
        if one["role"] != "assistant":
            continue
        try:
            after, announced = render(turn + 1, False), render(len(messages), True)[len(text):]
            # transformers refuses to print no message: what announces an answer is learnt from the end.
            first = after[:after.find(announced) + len(announced)] if announced and announced in after else ""
            before = render(turn, True) if turn else first
        except Exception:
            return dict(found, unstable=turn + 1)
        if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
            return dict(found, unstable=turn + 1)
        spans.append((len(before), len(after)))
    encoding = fast(text, add_special_tokens=False, return_offsets_mapping=True)
    assert list(encoding["input_ids"]) == found["ids"]
    mask = [int(any(a < end and b > begin for begin, end in spans)) for a, b in encoding["offset_mapping"]]
    return dict(found, mask=mask)


if __name__ == "__main__":
    import transformers.utils.chat_template_utils as utils

    utils.datetime = Day
    for directory in sorted(at for at in HERE.iterdir() if (at / "chat_template.jinja").exists()):
        fast = tokenizer(directory)
        rows = [golden(fast, row) for row in ROWS]
        (directory / "golden.json").write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")
        print(directory.name, [row.get("error") or row.get("unstable") or sum(row["mask"]) for row in rows])
