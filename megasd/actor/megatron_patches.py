"""Mends of three defects in megatron-core 0.16.1's DistributedOptimizer checkpoints.

The defects show wherever Megatron falls back on torch's AdamW, on a GPU as on a CPU: without
TransformerEngine and Apex. With one of them installed nothing here is needed, and
`install_megatron_patches` does nothing.
"""

from __future__ import annotations

import torch

_installed = False


def install_megatron_patches() -> None:
    """Patch DistributedOptimizer, once, where Megatron uses torch's AdamW.

    A fused Adam keeps its step in the parameter group and has none of the defects.
    """
    global _installed
    from megatron.core.optimizer import Adam
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if _installed or Adam is not torch.optim.AdamW:
        return
    state_dict, load_state_dict = DistributedOptimizer.state_dict, DistributedOptimizer.load_state_dict

    def state_dict_from_the_first_step(self: DistributedOptimizer) -> dict:
        """Make the state as zeros before the first step, where distrib_optimizer.py:642 asserts."""
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

    # Main parameters are views of leaf parameters, into which autograd forbids a copy.
    @torch.no_grad()
    def set_main_param_and_optimizer_states(
        self: DistributedOptimizer, model_param: torch.Tensor, tensors: dict
    ) -> None:
        """Fill all but the step, for which distrib_optimizer.py:940 raises KeyError.

        torch's step comes from load_state_dict.
        """
        group, order = self.model_param_group_index_map[model_param]
        main_param = self.optimizer.param_groups[group]["params"][order]
        for key, target in {"param": main_param, **self.optimizer.state[main_param]}.items():
            if key != "step":
                target.copy_(tensors[key])

    def load_state_dict_with_own_steps(self: DistributedOptimizer, state: dict) -> None:
        """Give every parameter a step tensor of its own.

        distrib_optimizer.py:825 gives all parameters the same one, to which Adam adds in place once
        per parameter.
        """
        load_state_dict(self, state)
        for parameter_state in self.optimizer.state.values():
            if "step" in parameter_state:
                parameter_state["step"] = parameter_state["step"].clone()

    DistributedOptimizer.state_dict = state_dict_from_the_first_step
    DistributedOptimizer._set_main_param_and_optimizer_states = set_main_param_and_optimizer_states
    DistributedOptimizer.load_state_dict = load_state_dict_with_own_steps
    _installed = True
