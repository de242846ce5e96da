"""Runs exported folders where the project cannot be imported: `python -I -S this.py jobs.json results.safetensors`.

-I and -S keep the working directory, this file's folder and every .pth file, so an editable install too, off sys.path.
jobs.json: {"site": folders of installed packages, "project": its folder, "jobs": [{"name", "folder", "inputs"}]}.
"""

import importlib.util
import json
import sys
from pathlib import Path

PACKAGES = ("model", "kernels", "stages", "pipeline", "tests")


def main(jobs_file: str, results_file: str) -> None:
    request = json.loads(Path(jobs_file).read_text())
    sys.path.extend(request["site"])
    ours = [Path(request["project"]) / name for name in PACKAGES]
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is None or not below(spec.origin, ours), f"{name} can be imported, so this proves nothing"
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(1)
    results: dict[str, torch.Tensor] = {}
    for job in request["jobs"]:
        inputs = load_file(job["inputs"])
        with torch.no_grad():
            found = run(Path(job["folder"]), inputs)
        results |= {f"{job['name']}/{key}": value.contiguous() for key, value in found.items()}
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    assert [file for file in files if below(file, ours)] == [__file__]
    save_file(results, results_file)


def below(file: str | None, folders: list[Path]) -> bool:
    return file is not None and any(folder in Path(file).parents for folder in folders)


def run(folder, inputs):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(config).__name__ == "LazypipeConfig"
    assert not model.training
    tokens, mask, ragged = inputs["tokens"], inputs["mask"], inputs["ragged"]
    found = {"logits": model(tokens, use_cache=False).logits, "cached": model(tokens).logits}
    found["long"] = model(inputs["long"], use_cache=False).logits
    found["long_cached"] = model(inputs["long"]).logits
    for side in ("left", "right"):
        padded = model(inputs[f"long_{side}"], attention_mask=inputs[f"long_{side}_mask"])
        found[f"long_{side}"] = padded.logits
    found["last"] = model(tokens, logits_to_keep=1).logits

    steps: list[torch.Tensor] = []
    cache = None
    for start, end in [(0, 7), (7, 8), (8, 13), *((i, i + 1) for i in range(13, tokens.shape[1]))]:
        step = model(tokens[:, start:end], past_key_values=cache)
        steps, cache = [*steps, step.logits], step.past_key_values
    found["stepwise"] = torch.cat(steps, dim=1)
    prefill = model(ragged, attention_mask=mask)
    more = torch.cat((mask, mask.new_ones(len(mask), 2)), dim=1)
    following = tokens[:1, :2].expand(len(ragged), -1)
    found["after_padding"] = model(following, attention_mask=more, past_key_values=prefill.past_key_values).logits
    prefill = model(ragged, attention_mask=mask)
    found["mask_remembered"] = model(following, past_key_values=prefill.past_key_values).logits

    embedded = model(inputs_embeds=model.get_input_embeddings()(tokens), output_hidden_states=True)
    found["embedded"] = embedded.logits
    assert len(embedded.hidden_states) == config.num_hidden_layers + 1
    found["loss"] = model(tokens, labels=inputs["labels"]).loss[None]
    as_tuple = model(tokens, labels=inputs["labels"], return_dict=False)
    assert torch.equal(as_tuple[0][None], found["loss"])

    length = {"max_new_tokens": 8}
    found["greedy"] = model.generate(tokens, do_sample=False, **length)
    found["greedy_padded"] = model.generate(ragged, attention_mask=mask, do_sample=False, **length)
    for name, options in {"beams": {"num_beams": 3}, "sampled": {"do_sample": True, "top_k": 5}}.items():
        for cached in (True, False):
            torch.manual_seed(3)
            found[f"{name}_{cached}"] = model.generate(
                ragged, attention_mask=mask, use_cache=cached, **options, **length
            )
    beams = model.generate(ragged, attention_mask=mask, num_beams=3, num_return_sequences=2, **length)
    assert len(beams) == 2 * len(ragged)

    again = folder.with_name(folder.name + "_again")
    model.save_pretrained(again)
    config.save_pretrained(again)
    found["saved_again"] = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)(tokens).logits

    half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16)
    kept = {name for name, value in half.named_parameters() if value.dtype == torch.float32}
    assert kept == {name for name, _ in half.named_parameters() if name.endswith(("mixer.tau", "mixer.bias"))}
    found["half"] = half(tokens).logits.float()
    found["half_generated"] = half.generate(ragged, attention_mask=mask, do_sample=False, **length)
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True).train()
    for p, q in zip(fresh.parameters(), model.parameters(), strict=True):
        assert p.shape == q.shape
    with torch.enable_grad():
        loss = fresh(tokens, labels=tokens).loss
        loss.backward()
    assert 3 < float(loss.detach()) < 6, float(loss.detach())  # ln 61 = 4.1
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
