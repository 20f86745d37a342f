"""Are our logits as exact as transformers' own? Random weights at a released shape, workloads S and R: our bf16 and
transformers' bf16, each against transformers' fp32. Exit code 1 if ours are further off than theirs by a tenth.

    python bench/logits.py                 3B on a GPU; on a CPU the embedded model's shape, S only
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from workloads import R, S, arguments, model_config, peer_inputs, peer_model, sft_batch

from model.loading import random_model


@torch.no_grad()
def main() -> None:
    args = arguments(__doc__).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = model_config(args.model)
    ours = random_model(config, device, torch.bfloat16).eval()
    found = {}
    for name, work in {"S": S, "R": R}.items() if device == "cuda" else {"S": S}.items():
        packed = sft_batch(config, work, 1).to(device)
        mine = ours.logits(packed).float()
        peer = peer_model(ours).eval()
        results = []
        for dtype in (torch.bfloat16, torch.float32):
            if dtype == torch.float32:  # not our weights any more (.to(bf16) would round angles too)
                peer = peer.to(dtype)
            inputs = peer_inputs(config, packed, 1, dtype)
            results.append(peer(**inputs, position_ids=packed.position_ids[:, None]).logits[0].float())
        theirs, exact = results
        off = lambda x, exact=exact: float((x - exact).norm() / exact.norm())
        found[name] = {"ours": off(mine), "transformers": off(theirs)}
        print(f"{name}: relative error in bf16: ours {off(mine):.4f}, transformers {off(theirs):.4f}")
        del peer, exact, theirs, results
    print(json.dumps(found))
    raise SystemExit(any(f["ours"] > 1.1 * f["transformers"] for f in found.values()))


if __name__ == "__main__":
    main()
