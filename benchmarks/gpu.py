"""Peers that exist on a GPU only, where they are installed: Liger, QuACK, Apex. What cannot be imported is no peer."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .case import EPS, Case, Contender, Data


def peers(case: Case) -> list[Contender]:
    found = {
        "layer_norm": [
            ("Liger layer_norm", "liger_kernel.ops.layer_norm", "LigerLayerNormFunction", _liger_layer),
            ("Apex layer_norm", "apex.normalization.fused_layer_norm", "fused_layer_norm_affine", _apex_layer),
        ],
        "rms_norm": [
            ("Liger rms_norm", "liger_kernel.ops.rms_norm", "LigerRMSNormFunction", _liger_rms),
            ("QuACK rmsnorm", "quack", "rmsnorm", _quack_rms),
            ("Apex rms_norm", "apex.normalization.fused_layer_norm", "fused_rms_norm_affine", _apex_rms),
        ],
        "group_norm": [("Liger group_norm", "liger_kernel.ops.group_norm", "LigerGroupNormFunction", _liger_group)],
    }
    made = []
    for title, module, name, call in found.get(case.fused or "", []):
        try:
            function = getattr(import_module(module), name)
        except Exception:  # a broken install fails in many ways
            continue
        made.append(Contender(title, lambda d, call=call, function=function: call(function, d)))
    return made


def _liger_layer(f: Any, d: Data) -> Any:
    return f.apply(d.x, d.weight, d.bias, EPS)


def _liger_rms(f: Any, d: Data) -> Any:
    # offset 0, the casts of Llama, and the incoming gradient left as it is
    return f.apply(d.x, d.weight, EPS, 0.0, "llama", False)


def _liger_group(f: Any, d: Data) -> Any:
    n, c, *space = d.x.shape
    return f.apply(d.x.view(n, c, -1), d.weight, d.bias, c, d.groups, EPS).view(n, c, *space)


def _quack_rms(f: Any, d: Data) -> Any:
    return f(d.x.view(-1, d.x.shape[-1]), d.weight, eps=EPS).view_as(d.x)


def _apex_layer(f: Any, d: Data) -> Any:
    return f(d.x, d.weight, d.bias, d.x.shape[-1:], EPS)


def _apex_rms(f: Any, d: Data) -> Any:
    return f(d.x, d.weight, d.x.shape[-1:], EPS)
