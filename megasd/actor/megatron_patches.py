"""Three defects of megatron-core 0.16.1's DistributedOptimizer checkpoints with torch's AdamW (no
TransformerEngine, no Apex).

Not a matter of the CPU: they bite wherever FusedAdam is absent. With TransformerEngine installed
nothing here is needed and `install_megatron_patches` does nothing.
"""

from __future__ import annotations

import torch

_installed = False


def install_megatron_patches() -> None:
    """Patch DistributedOptimizer, once, unless Megatron uses a fused Adam that keeps its step in
    the parameter group.
    """
    global _installed
    from megatron.core.optimizer import Adam
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if _installed or Adam is not torch.optim.AdamW:
        return
    state_dict, load_state_dict = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict

    def state_dict_from_the_first_step(self: DistributedOptimizer) -> dict:
        """distrib_optimizer.py:642 asserts before the first step: the state exists as zeros instead."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = (
                        torch.zeros_like(parameter),
                        torch.zeros_like(parameter),
                    )
        return state_dict(self)

    # main parameters are views of leaf parameters
    @torch.no_grad()
    def set_main_param_and_optimizer_states(
        self: DistributedOptimizer, model_param: torch.Tensor, tensors: dict
    ) -> None:
        """distrib_optimizer.py:940 raises KeyError 'step'; torch's step comes from load_state_dict."""
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        for key, target in {"param": main_param, **self.optimizer.state[main_param]}.items():
            if key != "step":
                target.copy_(tensors[key])

    def load_state_dict_with_own_steps(self: DistributedOptimizer, state: dict) -> None:
        """distrib_optimizer.py:825 gives all parameters ONE step tensor, to which Adam adds in
        place once per parameter.
        """
        load_state_dict(self, state)
        for parameter_state in self.optimizer.state.values():
            if "step" in parameter_state:
                parameter_state["step"] = parameter_state["step"].clone()

    DistributedOptimizer.state_dict = state_dict_from_the_first_step
    DistributedOptimizer._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states
    DistributedOptimizer.load_state_dict = load_state_dict_with_own_steps
    _installed = True
