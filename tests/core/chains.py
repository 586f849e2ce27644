"""The chains that backends are compared on: each option by itself, then all that go together."""

from __future__ import annotations

from hb_adam import SGD, AdamW

EVERYTHING = {
    "caution": True,
    "cautious_weight_decay": True,
    "weight_decay": 0.1,
    "mars": True,
    "mars_gamma": 0.025,
    "gradient_clipping": "global_l2norm_clip",
    "update_clipping": ("l2_clip_", 3.0),
    "warmup_steps": 2,
    "maximize": True,
}
SHARED = {
    "plain": {},
    "decay": {"weight_decay": 0.1, "warmup_steps": 2, "maximize": True},
    "cautious-decay": {"weight_decay": 0.1, "cautious_weight_decay": True},
    "caution": {"caution": True},
    "mars": {"mars": True, "mars_gamma": 0.025},
    "clip-update": {"update_clipping": "l2_clip_"},
    "clip-gradient": {"gradient_clipping": "global_l2norm_clip"},
    "everything": EVERYTHING,
    "capturable": {"capturable": True, "weight_decay": 0.1},
    "capturable-everything": {"capturable": True, **EVERYTHING},
}
ADAMW = {f"adamw-{name}": (AdamW, options) for name, options in SHARED.items()}
ADAMW |= {f"adamw-{d}": (AdamW, {"division_backend": d, "eps": 0.01}) for d in ("eps_add", "atan2", "nan_to_0")}
SGDS = {f"sgd-{name}": (SGD, options) for name, options in SHARED.items()}
SGDS |= {
    "sgd-nesterov": (SGD, {"nesterov": True, "dampening": 0.2}),
    "sgd-coupled": (SGD, {"weight_decay": 0.1, "decoupled_weight_decay": False}),
}
CHAINS = ADAMW | SGDS
