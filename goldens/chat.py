"""Goldens for chat templates: what transformers makes of conversations, with the templates in chat/.

    pip install transformers==5.17.0 tokenizers jinja2
    python goldens/chat.py

Writes into every directory of chat/ a small byte-level tokenizer.json, tokenizer_config.json and golden.json: for each
conversation the ids of `apply_chat_template` and the mask of the assistant's tokens. Where the template has no
{% generation %} block the mask is found by comparing what transformers prints for the beginnings of a conversation;
`unstable` is the first turn for which they differ, counted from 1.
"""

import json
import pathlib
import re

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).parent / "chat"
TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Tells the weather: \"now\" <b>&amp;</b> é.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "number", "default": 1.0}},
                       "required": ["city"], "strict": True, "nothing": None}}}
SPECIAL = {
    "qwen2.5": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    "chatml-generation": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"],
}
TOKENS = {
    "qwen2.5": dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"),
    "qwen3": dict(eos_token="<|im_end|>", pad_token="<|endoftext|>"),
    "chatml-generation": dict(eos_token="<|im_end|>"),
    "llama3": dict(bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"),
    "mistral": dict(bos_token="<s>", eos_token="</s>"),
}


def message(role, content, **more):
    return {"role": role, "content": content, **more}


CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Zürich", "days": 2.5}}}
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
    {"messages": [message("user", "Weather?"), message("assistant", "", tool_calls=[CALL]),
                  message("tool", "rain"), message("assistant", "It rains.")], "tools": [TOOL]},
    {"messages": [message("user", "a"), message("assistant", "b"), message("user", "c"), message("assistant", "d")], "tools": [TOOL]},
]


def tokenizer(name):
    template = (HERE / name / "chat_template.jinja").read_text()
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    corpus = [template] + [m["content"] for row in ROWS for m in row["messages"]]
    trainer = trainers.BpeTrainer(vocab_size=360, show_progress=False, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL[name]])
    backend.train_from_iterator(corpus, trainer)
    backend.save(str(HERE / name / "tokenizer.json"))
    (HERE / name / "tokenizer_config.json").write_text(json.dumps(TOKENS[name], indent=1) + "\n")
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template, **TOKENS[name])


def golden(fast, row):
    messages, tools = row["messages"], row.get("tools")
    render = lambda upto, ask: fast.apply_chat_template(messages[:upto], tools=tools, tokenize=False, add_generation_prompt=ask)
    try:
        text = render(len(messages), False)
    except Exception as error:
        return dict(row, error=str(error))
    options = dict(tools=tools, return_dict=True, tokenize=True)
    out = fast.apply_chat_template(messages, return_assistant_tokens_mask="generation %}" in fast.chat_template, **options)
    found = dict(row, text=text, ids=list(out["input_ids"]))
    if "assistant_masks" in out:
        return dict(found, mask=list(out["assistant_masks"]))
    spans = []
    for turn, one in enumerate(messages):
        if one["role"] != "assistant":
            continue
        before, after = render(turn, True), render(turn + 1, False)
        if not (text.startswith(before) and text.startswith(after) and len(before) < len(after)):
            return dict(found, unstable=turn + 1)
        spans.append((len(before), len(after)))
    encoding = fast(text, add_special_tokens=False, return_offsets_mapping=True)
    assert list(encoding["input_ids"]) == found["ids"]
    mask = [int(any(a < end and b > begin for begin, end in spans)) for a, b in encoding["offset_mapping"]]
    return dict(found, mask=mask)


if __name__ == "__main__":
    for name in sorted(SPECIAL):
        fast = tokenizer(name)
        rows = [golden(fast, row) for row in ROWS]
        (HERE / name / "golden.json").write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n")
        print(name, [row.get("unstable") or row.get("error", sum(row.get("mask", []))) for row in rows])
