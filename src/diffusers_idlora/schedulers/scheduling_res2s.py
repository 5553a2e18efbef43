"""res_2s: a second-order exponential integrator with noise injection, the sampler of the HQ recipe."""

import math
import numbers
from collections.abc import Sequence
from typing import Literal

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput

# To load a saved pipeline, diffusers looks in a component's own module for the kind of component that it is.
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401
from diffusers.utils.torch_utils import randn_tensor


class LTX2Res2sScheduler(FlowMatchEulerDiscreteScheduler):
    r"""
    The res_2s sampler for flow matching models that predict a velocity (method section 5).

    A step from `sigma` to `sigma_next` evaluates the model twice: at `sigma` and at the substep
    `sqrt(sigma * sigma_next)`. Noise is mixed in after each of them. As in diffusers' other second-order schedulers,
    `timesteps` has an entry for every evaluation and each calls [`~LTX2Res2sScheduler.step`], so a loop written for
    [`FlowMatchEulerDiscreteScheduler`] stays as it is. `sigmas` has the noise level of every evaluation, and a last 0.

    A 0 at the end of the noise levels is replaced by `final_sigma`, with one plain step to the predicted x0 after it:
    `n` steps are `2 * n + 1` evaluations. Samples may be changed between two calls of `step`, e.g. to put clean tokens
    back; what is given next is what the step goes on with.

    The noise levels and the configuration for them are those of [`FlowMatchEulerDiscreteScheduler`], whose `config`
    `from_config` takes. Between the two evaluations of a step it holds the sample that the step started from, so each
    tensor that is denoised needs a copy of its own (`copy.deepcopy`).

    Args:
        num_train_timesteps (`int`, defaults to 1000), shift (`float`, defaults to 1.0),
        use_dynamic_shifting (`bool`, defaults to `False`), base_shift (`float`, defaults to 0.5),
        max_shift (`float`, defaults to 1.15), base_image_seq_len (`int`, defaults to 256),
        max_image_seq_len (`int`, defaults to 4096), shift_terminal (`float`, *optional*),
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas (`bool`, defaults to `False`),
        time_shift_type (`str`, defaults to `"exponential"`):
            See [`FlowMatchEulerDiscreteScheduler`].
        invert_sigmas (`bool`, defaults to `False`):
            Has to be `False`; here so that the configuration of the other scheduler can be taken.
        stochastic_sampling (`bool`, defaults to `False`):
            No effect; `eta` says how much noise is mixed in.
        eta (`float`, defaults to 0.5):
            How much of each new noise level is new noise, from 0 (none, and none is drawn) to 1.
        bong_iterations (`int`, defaults to 100):
            How often the sample that a step started from is refined, so that the noisy substep follows from it.
        bong_max_step_size (`float`, defaults to 0.5):
            It is refined only in steps whose `log(sigma / sigma_next)` is smaller.
        bong_min_sigma (`float`, defaults to 0.03):
            It is refined only in steps whose `sigma` is larger.
        final_sigma (`float`, defaults to 0.0011):
            The last noise level that is integrated to. Where the last one given is not larger, the plain step follows
            from there.

    Example:
        ```py
        pipe.scheduler = LTX2Res2sScheduler.from_config(pipe.scheduler.config)
        ```
    """

    order = 2

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        stochastic_sampling: bool = False,
        eta: float = 0.5,
        bong_iterations: int = 100,
        bong_max_step_size: float = 0.5,
        bong_min_sigma: float = 0.03,
        final_sigma: float = 0.0011,
    ):
        if invert_sigmas:
            raise ValueError("`invert_sigmas` is True; res_2s needs noise levels that fall to 0, so set it to False.")
        if not isinstance(eta, numbers.Real) or not 0.0 <= eta <= 1.0:
            raise ValueError(f"`eta` is {eta!r}; give a number from 0 (no new noise) to 1.")
        if not isinstance(bong_iterations, numbers.Integral) or bong_iterations < 0:
            raise ValueError(f"`bong_iterations` is {bong_iterations!r}; give a whole number of at least 0.")
        if not isinstance(final_sigma, numbers.Real) or not 0.0 < final_sigma < 1.0:
            raise ValueError(f"`final_sigma` is {final_sigma!r}; give a noise level between 0 and 1.")
        super().__init__(
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            shift_terminal=shift_terminal,
            use_karras_sigmas=use_karras_sigmas,
            use_exponential_sigmas=use_exponential_sigmas,
            use_beta_sigmas=use_beta_sigmas,
            time_shift_type=time_shift_type,
            stochastic_sampling=stochastic_sampling,
        )
        self.num_inference_steps = None
        self._anchor = None
        self._first_x0 = None

    @property
    def state_in_first_order(self) -> bool:
        """Whether the next evaluation is the first of a step."""
        return self._anchor is None

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """
        Sets the noise levels and forgets a step that was not finished.

        Args:
            num_inference_steps (`int`, *optional*):
                Steps of two evaluations each, at the noise levels that [`FlowMatchEulerDiscreteScheduler`] has for as
                many. Not needed with `sigmas`.
            device (`str` or `torch.device`, *optional*):
                Where `timesteps` are. `sigmas` stay on the CPU, where they are read at every step.
            sigmas (`Sequence[float]`, *optional*):
                Noise levels that fall from at most 1; a last 0 may be there or not. Used exactly as given, unless `mu`
                asks for a shift.
            mu (`float`, *optional*):
                The shift, for a configuration with `use_dynamic_shifting`. Given beside `sigmas`, these are shifted
                and stretched as [`FlowMatchEulerDiscreteScheduler`] does it.

        Raises:
            ValueError: If nothing or no falling noise levels are given.
        """
        levels = self._levels(num_inference_steps, sigmas, mu)
        self.num_inference_steps = len(levels)
        if levels[-1] > self.config.final_sigma:
            levels.append(self.config.final_sigma)
        evaluations = [sigma for pair in zip(levels, levels[1:]) for sigma in (pair[0], math.sqrt(math.prod(pair)))]
        self.sigmas = torch.tensor([*evaluations, levels[-1], 0.0], dtype=torch.float32)
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)
        self._step_index = self._begin_index = None
        self._anchor = self._first_x0 = None

    def _levels(
        self, num_inference_steps: int | None, sigmas: Sequence[float] | None, mu: float | None
    ) -> list[float]:
        """The noise levels of the steps, without a last 0."""
        if sigmas is not None:
            sigmas = _without_last_zero(sigmas)
            _check_levels(sigmas)
            if num_inference_steps not in (None, len(sigmas)):
                raise ValueError(
                    f"`num_inference_steps` is {num_inference_steps}, but `sigmas` are {len(sigmas)} steps; leave one"
                    " of them out."
                )
            if mu is None:
                return sigmas
        elif not isinstance(num_inference_steps, numbers.Integral) or num_inference_steps < 1:
            raise ValueError(
                f"`num_inference_steps` is {num_inference_steps!r}; give a whole number of at least 1, or `sigmas`."
            )
        count = num_inference_steps if sigmas is None else len(sigmas)
        if count == 1 and self.config.shift_terminal:
            raise ValueError(
                "`num_inference_steps` is 1, and one step can't be stretched to the `shift_terminal` of the"
                " configuration; take at least 2 steps, or give `sigmas` without `mu`."
            )
        super().set_timesteps(num_inference_steps, sigmas=sigmas, mu=mu)
        levels = self.sigmas[:-1].tolist()
        _check_levels(levels)
        return levels

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[torch.Tensor]:
        """
        The sample for the next evaluation. The arithmetic is in float64.

        Args:
            model_output (`torch.Tensor`): The velocity, `(sample - x0) / sigma`, `[B, tokens, channels]`.
            timestep (`float` or `torch.Tensor`): The entry of `timesteps` it was predicted at.
            sample (`torch.Tensor`): What it was predicted from, of the same shape.
            generator (`torch.Generator` or a list of these, *optional*): Source of noise, or one for each row.
            noise (`torch.Tensor`, *optional*):
                Instead of drawing it; used as it is. Drawn noise has mean 0 and deviation 1 in each row.
            return_dict (`bool`, defaults to `True`): Whether to return an output object rather than a tuple.

        Returns:
            [`FlowMatchEulerDiscreteSchedulerOutput`] or `tuple`: The sample, in the dtype of `sample`.
        """
        self._check_step(timestep)
        index = self.step_index
        # There is no float64 on Apple's GPUs.
        dtype = torch.float32 if sample.device.type == "mps" else torch.float64
        current = sample.to(dtype)
        x0 = current - float(self.sigmas[index]) * model_output.to(dtype)
        if index == len(self.timesteps) - 1:
            next_sample = x0
        else:
            if self.config.eta > 0 and noise is None:
                noise = _standardised(randn_tensor(sample.shape, generator, sample.device, dtype))
            next_sample = self._to_substep(x0, current, noise) if index % 2 == 0 else self._to_step(x0, current, noise)
        self._step_index += 1
        next_sample = next_sample.to(sample.dtype)
        if not return_dict:
            return (next_sample,)
        return FlowMatchEulerDiscreteSchedulerOutput(prev_sample=next_sample)

    def _check_step(self, timestep: float | torch.Tensor) -> None:
        """Finds the evaluation that `timestep` is of, if it is the first, and refuses one that can't be."""
        if self.num_inference_steps is None:
            raise ValueError("`step` was called before there are noise levels; call `set_timesteps` first.")
        if self.step_index is None:
            if self.begin_index is None and float(timestep) not in self.timesteps.tolist():
                raise ValueError(f"`timestep` is {timestep}; give one of the scheduler's `timesteps`.")
            self._init_step_index(timestep)
        if self.step_index >= len(self.timesteps):
            raise ValueError("`step` was called after the last of `timesteps`; call `set_timesteps` to begin again.")
        if self.step_index % 2 and self.state_in_first_order:
            raise ValueError(f"`timestep` is {timestep}, a substep; begin with a timestep of an even number.")

    def _to_substep(self, x0: torch.Tensor, sample: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        sigma, substep_sigma, sigma_next = self.sigmas[self.step_index :][:3].tolist()
        weight = _substep_weight(math.log(sigma / sigma_next))
        self._anchor, self._first_x0 = sample, x0
        return self._mix_noise(sample, sample + weight * (x0 - sample), sigma, substep_sigma, noise)

    def _to_step(self, x0: torch.Tensor, sample: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        sigma, _, sigma_next = self.sigmas[self.step_index - 1 :][:3].tolist()
        step_size = math.log(sigma / sigma_next)
        anchor, first_x0 = self._anchor, self._first_x0
        self._anchor = self._first_x0 = None
        if step_size < self.config.bong_max_step_size and sigma > self.config.bong_min_sigma:
            anchor = self._refine(anchor, first_x0, sample, _substep_weight(step_size))
        second_weight = 2 * _phi_2(-step_size)
        first_weight = _phi_1(-step_size) - second_weight
        change = first_weight * (first_x0 - anchor) + second_weight * (x0 - anchor)
        return self._mix_noise(anchor, anchor + step_size * change, sigma, sigma_next, noise)

    def _refine(
        self, anchor: torch.Tensor, first_x0: torch.Tensor, substep: torch.Tensor, weight: float
    ) -> torch.Tensor:
        """`anchor <- substep - weight * (first_x0 - anchor)`, as often as configured, in closed form."""
        fixed_point = (substep - weight * first_x0) / (1 - weight)
        return fixed_point + weight**self.config.bong_iterations * (anchor - fixed_point)

    def _mix_noise(
        self, anchor: torch.Tensor, sample: torch.Tensor, sigma: float, sigma_next: float, noise: torch.Tensor | None
    ) -> torch.Tensor:
        """Takes the direction from `anchor` to `sample` further down and comes back up to `sigma_next` with noise."""
        if self.config.eta == 0:
            return sample
        up = min(self.config.eta, 0.9999) * sigma_next
        residual = math.sqrt(sigma_next**2 - up**2)
        alpha = 1 - sigma_next + residual
        direction = (anchor - sample) / (sigma - sigma_next)
        denoised = anchor - sigma * direction
        return alpha * denoised + residual * direction + up * noise.to(sample)


def _phi_1(z: float) -> float:
    return math.expm1(z) / z


def _phi_2(z: float) -> float:
    return (math.expm1(z) - z) / z**2


def _substep_weight(step_size: float) -> float:
    """How far the substep goes from the sample to its x0."""
    return step_size * _phi_1(-step_size / 2) / 2


def _standardised(noise: torch.Tensor) -> torch.Tensor:
    """Each row by itself, so that a batch equals its rows; then its last two dimensions, as the original does."""
    if noise.ndim < 3:
        raise ValueError(f"`sample` has the shape {tuple(noise.shape)}; give at least [B, tokens, channels].")
    for dims in (tuple(range(1, noise.ndim)), (-2, -1)):
        noise = (noise - noise.mean(dims, keepdim=True)) / noise.std(dims, keepdim=True)
    return noise


def _without_last_zero(sigmas: Sequence[float]) -> list[float]:
    try:
        levels = [float(sigma) for sigma in sigmas]
    except (TypeError, ValueError):
        raise ValueError(f"`sigmas` are {sigmas!r}; give a list of numbers that fall from at most 1.") from None
    return levels[:-1] if levels and levels[-1] == 0.0 else levels


def _check_levels(levels: list[float]) -> None:
    falling = all(first > second for first, second in zip(levels, levels[1:]))
    if not levels or not falling or not all(0.0 < level <= 1.0 for level in levels):
        raise ValueError(f"`sigmas` are {levels}; give noise levels that fall from at most 1 to above 0.")
