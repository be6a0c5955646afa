"""Results of models that were never trained."""

import json

TARGETS = [10, 30, 20, 40]


def result(kind, seed, loss, *, growth=0.0, spread=0.1):
    """As `run_model.py` writes it: four documents, whose losses a token differ by `spread` from one to the next."""

    def of_length(loss):
        losses = [loss + spread * (i - 1.7) for i in range(4)]  # 1.7: the mean over targets
        means = {"loss": loss, "loss_by_octave": [[0, loss + 1], [16, loss], [32, loss - 0.1]]}
        return means | {"document_losses": [x * count for x, count in zip(losses, TARGETS, strict=True)]}

    return {
        "kind": kind,
        "seed": seed,
        "parameters": 33_500_000,
        "seconds": 60.0,
        "device": "a card",
        "jax": "0.11.2",
        "training_tokens": 800,
        "document_targets": TARGETS,
        "validation_losses": [[step, loss + 8 / step] for step in (1, 2, 4, 8)],
        "config": {"data": {"seq_len": 16}, "training": {"num_steps": 8}},
        "lengths": {str(16 * times): of_length(loss + growth * (times - 1)) for times in (1, 2, 4, 8)},
    }


def write(folder, *results, speeds=None):
    for name in ("results", "speeds"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for values in results:
        (folder / "results" / f"{values['kind']}-{values['seed']}.json").write_text(json.dumps(values))
    for kind, speed in (speeds or {}).items():
        (folder / "speeds" / f"{kind}.json").write_text(json.dumps({"kind": kind, "tokens_per_second": speed}))
    return folder
