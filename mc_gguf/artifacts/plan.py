"""Plan: the type of every expert and projection, as JSON, one line per row of experts, sorted and stable so
that it can be read and diffed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mc_gguf import __version__
from mc_gguf.artifacts.header import check_header
from mc_gguf.artifacts.model import ATTENTION, PROJECTIONS
from mc_gguf.common.errors import ArtifactError
from mc_gguf.common.files import atomic_write, sha256_of

PLAN_VERSION = 1


@dataclass(frozen=True)
class FixedTypes:
    """Types of the tensors that are not experts; the router and everything 1-D stay F32.

    K and V are small and every token depends on them; Q, output projection and embeddings cost little at 6.6
    bits. `attention`, where not empty, overrides `attn` and `attn_kv`: a row for every layer with the types
    of its matrices, in the order of ATTENTION.
    """

    attn_kv: str = "Q8_0"
    attn: str = "Q6_K"
    token_embd: str = "Q6_K"
    output: str = "Q6_K"
    attention: tuple[tuple[str, ...], ...] = ()

    def attention_type(self, layer: int, part: str) -> str:
        """Of the matrix `part` (one of ATTENTION) in `layer`."""
        if self.attention:
            return self.attention[layer][ATTENTION.index(part)]
        return self.attn_kv if part in ("k", "v") else self.attn


@dataclass(frozen=True)
class Plan:
    """The type of every expert and projection, with what it was decided from and what it will cost.

    `experts[projection][i][expert]` is a ggml type name, i counting `layers`. `file_bytes` is exact when the
    calibration knows the model, else None. `predicted_error` is the sum over experts of the squared output
    errors divided by the same sum of squared outputs (None for published statistics); `predicted_kld` is in
    nats a token, None when the calibration did not measure it. `objective` is what was minimised, and
    `layer_ratio` its value relative to the best plan with one type per layer and projection in the same bytes
    (strategy pmq only). `bits` is set by strategy `mc` only; `refinement` by refine: mean KL divergences
    (nats a token) before and after, and what the search was asked for.
    """

    strategy: str
    budget: dict[str, float]
    layers: tuple[int, ...]
    experts: dict[str, tuple[tuple[str, ...], ...]]
    fixed: FixedTypes
    types: tuple[str, ...]
    model_fingerprint: str
    calibration_fingerprint: str
    expert_bpw: float
    expert_bytes: int | None
    file_bytes: int | None
    predicted_error: float | None
    optimality_gap: float | None
    seed: int = 0
    bits: tuple[tuple[int, ...], ...] | None = None
    objective: str = "block"
    predicted_kld: float | None = None
    layer_ratio: float | None = None
    refinement: dict[str, float | str] | None = None
    tool: str = field(default=f"mc_gguf {__version__}")
    fingerprint: str = ""

    def type_of(self, layer: int, expert: int, projection: str) -> str:
        return self.experts[projection][self.layers.index(layer)][expert]

    def to_text(self) -> str:
        """The file's text: sorted keys, one line per row of experts."""
        body = {k: v for k, v in asdict(self).items() if k not in ("fingerprint", "experts", "bits")}
        body["fixed"] = {k: v for k, v in body["fixed"].items() if k != "attention"}
        body |= {"format": "mc_gguf.plan", "version": PLAN_VERSION}
        rows: dict[str, Sequence[Sequence[object]]] = {f"experts_{p}": self.experts[p] for p in PROJECTIONS}
        if self.bits is not None:
            rows["bits"] = self.bits
        if self.fixed.attention:
            rows["attention"] = self.fixed.attention
        lines = [f'  "{key}": {json.dumps(body[key], sort_keys=True)}' for key in sorted(body)]
        for key in sorted(rows):
            table = ",\n".join(f"    {json.dumps(row)}" for row in rows[key])
            lines.append(f'  "{key}": [\n{table}\n  ]')
        return "{\n" + ",\n".join(sorted(lines)) + "\n}\n"

    def save(self, path: Path) -> Plan:
        """Write the file; returns this plan with `fingerprint` set to the file's SHA-256."""
        data = self.to_text().encode()
        with atomic_write(path) as file:
            file.write(data)
        return replace(self, fingerprint=hashlib.sha256(data).hexdigest())

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan. Raises ArtifactError when it is damaged, of another version, or incomplete."""
        fingerprint = sha256_of(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            check_header(path, data, "mc_gguf.plan", PLAN_VERSION)
            data.pop("format")
            data.pop("version")
            experts = {p: tuple(tuple(row) for row in data.pop(f"experts_{p}")) for p in PROJECTIONS}
            bits = data.pop("bits", None)
            attention = tuple(tuple(row) for row in data.pop("attention", ()))
            plan = cls(
                **{
                    **data,
                    "layers": tuple(data["layers"]),
                    "types": tuple(data["types"]),
                    "experts": experts,
                    "fixed": FixedTypes(**data["fixed"], attention=attention),
                    "fingerprint": fingerprint,
                    "bits": tuple(tuple(row) for row in bits) if bits is not None else None,
                }
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path} is not a valid plan ({error!r}); make one with: mc-gguf plan"
            ) from error
        _check_rows(path, plan)
        return plan


def _check_rows(path: Path, plan: Plan) -> None:
    rows = [row for table in plan.experts.values() for row in table]
    if any(len(table) != len(plan.layers) for table in plan.experts.values()) or not rows:
        raise ArtifactError(f"{path}: not one row of experts for each of {len(plan.layers)} layers")
    if any(len(row) != len(rows[0]) or not all(isinstance(name, str) for name in row) for row in rows):
        raise ArtifactError(f"{path}: every row of experts needs {len(rows[0])} names of types")
    attention = plan.fixed.attention
    named = all(len(r) == len(ATTENTION) and all(isinstance(n, str) for n in r) for r in attention)
    if attention and not (named and plan.layers == tuple(range(len(attention)))):
        raise ArtifactError(f"{path}: attention needs one row of {len(ATTENTION)} types for each layer")
