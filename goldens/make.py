"""Goldens for the engine: tiny random models with what transformers and torch compute from them.

    pip install torch==2.11.0 transformers==5.17.0 safetensors
    python goldens/make.py

Rewrites every directory beside this file: a model directory (config.json, model.safetensors in fp32) with
`golden.json` (documents, losses, gradient norms, autocast's error) and `golden.safetensors`:

- `<tensor>`: gradient of the mean loss of all targets, computed in fp64 and rounded to fp32 at the end;
- `logits`: fp32 logits of the document `logits_document` after the 20 steps.

The curve is 20 steps of torch.optim.AdamW in fp32 on all documents: learning rate 1e-3, betas 0.9 and 0.999, eps 1e-8,
weight decay 0.01 on matrices only, gradients clipped to norm 1. Each document is a forward pass of its own, so nothing
of packing can leak into the goldens.
"""

import json
import pathlib
import shutil

import torch
import transformers
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).parent
IGNORED = -100
SHAPE = dict(vocab_size=160, hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=0, eos_token_id=0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32, rope_theta=500000.0)
PLAIN = dict(rope_type="default", rope_theta=10000.0)

T = transformers
MODELS = {
    "llama": (T.LlamaForCausalLM, T.LlamaConfig(**SHAPE, head_dim=10, rope_parameters=LLAMA3, tie_word_embeddings=False)),
    "llama-tied": (T.LlamaForCausalLM, T.LlamaConfig(**SHAPE, head_dim=10, rope_parameters=LLAMA3, tie_word_embeddings=True,
                                                     attention_bias=True, mlp_bias=True)),
    "mistral": (T.MistralForCausalLM, T.MistralConfig(**SHAPE, head_dim=16, rope_parameters=PLAIN, sliding_window=9,
                                                      tie_word_embeddings=False)),
    "mistral-tied": (T.MistralForCausalLM, T.MistralConfig(**SHAPE, head_dim=10, rope_parameters=PLAIN, sliding_window=None,
                                                           tie_word_embeddings=True)),
    "qwen2": (T.Qwen2ForCausalLM, T.Qwen2Config(**SHAPE, rope_parameters=PLAIN, tie_word_embeddings=False)),
    "qwen2-tied": (T.Qwen2ForCausalLM, T.Qwen2Config(**SHAPE, rope_parameters=PLAIN, tie_word_embeddings=True)),
    "qwen3": (T.Qwen3ForCausalLM, T.Qwen3Config(**SHAPE, head_dim=16, rope_parameters=PLAIN, tie_word_embeddings=False)),
    "qwen3-tied": (T.Qwen3ForCausalLM, T.Qwen3Config(**SHAPE, head_dim=16, rope_parameters=PLAIN, tie_word_embeddings=True)),
}
# Written once more as transformers 4 would: rope_theta and rope_scaling, torch_dtype.
AS_VERSION_4 = {"llama", "qwen2-tied"}
STEPS = 20


def randomise(model):
    """Norms around 1, biases and matrices around 0, none of them at their initial value."""
    for name, p in model.named_parameters():
        if p.dim() == 2:
            p.data.normal_(0, 1.2 / p.shape[1] ** 0.5)
        elif name.endswith("bias"):
            p.data.uniform_(-0.5, 0.5)
        else:
            p.data.uniform_(0.5, 1.5)


def documents():
    """Token ids with targets (the next token, or none), several lengths."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for length, prompt in [(23, 9), (40, 11), (7, 3), (61, 30), (32, 1), (2, 1)]:
        ids = torch.randint(0, SHAPE["vocab_size"], (length,), generator=generator)
        # Repetition makes some tokens predictable, so that 20 steps are not about noise alone.
        ids[length // 2:] = ids[:length - length // 2].clone()
        targets = torch.cat([ids[1:], torch.tensor([IGNORED])])
        targets[:prompt - 1] = IGNORED
        rows.append((ids, targets))
    return rows


def loss_of(model, rows):
    total = sum((t != IGNORED).sum().item() for _, t in rows)
    losses = []
    for ids, targets in rows:
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        wide = logits if logits.dtype == torch.float64 else logits.float()
        losses.append(torch.nn.functional.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum"))
    return sum(losses) / total


def gradients(model, rows, autocast=False):
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = loss_of(model, rows)
    loss.backward()
    return loss.item(), {n: p.grad.detach().clone() for n, p in model.named_parameters()}


def norm(grads):
    return sum(g.double().square().sum() for g in grads.values()).sqrt().item()


def distance(a, b):
    """Relative L2 distance of whole gradients."""
    return (sum((a[n].double() - b[n].double()).square().sum() for n in b).sqrt() / norm(b)).item()


def make(name, kind, config):
    torch.manual_seed(0)
    config._attn_implementation = "eager"
    model = kind(config).float().train()
    randomise(model)
    rows = documents()
    out = HERE / name
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    if name in AS_VERSION_4:
        to_version_4(out / "config.json")

    loss64, exact = gradients(model.double(), rows)
    loss32, single = gradients(model.float(), rows)
    _, mixed = gradients(model, rows, autocast=True)
    golden = {
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "documents": [{"tokens": i.tolist(), "targets": [t if t != IGNORED else None for t in t.tolist()]} for i, t in rows],
        "loss_fp64": loss64, "loss": loss32, "grad_norm_fp64": norm(exact), "grad_norm": norm(single),
        "autocast_error": distance(mixed, single),
    }
    tensors = {n: g.float() for n, g in exact.items()}

    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
                                  lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    golden["curve"] = []
    for _ in range(STEPS):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(model, rows)
        loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        golden["curve"].append({"loss": loss.item(), "grad_norm": grad_norm.item()})
        optimizer.step()
    with torch.no_grad():
        tensors["logits"] = model(input_ids=rows[-2][0][None], use_cache=False).logits[0].clone()
    golden["logits_document"] = len(rows) - 2
    (out / "golden.json").write_text(json.dumps(golden) + "\n")
    save_file(tensors, out / "golden.safetensors")
    print(f"{name}: loss {golden['loss']:.6f} -> {golden['curve'][-1]['loss']:.6f}, autocast {golden['autocast_error']:.4f}")


def to_version_4(path):
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.57.0"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name, (kind, config) in MODELS.items():
        make(name, kind, config)
