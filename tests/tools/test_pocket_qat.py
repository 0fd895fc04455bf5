"""INT4 while training: codes, scales, and which tensors are rounded to what."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from pocket.config import model_config
from pocket.model import initial
from pocket.qat import REACHES, codes_and_scales, decoded, is_expert, multiplied

from tests.tools.pocket_copy import TINY


@given(st.integers(0, 999), st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e4]), st.sampled_from([2, 3, 4]))
def test_every_group_has_the_best_of_the_scales_tried(seed: int, size: float, bits: int) -> None:
    lowest, highest = {2: (-2, 1), 3: (-4, 3), 4: (-8, 7)}[bits]
    weight = size * torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
    codes, scales = codes_and_scales(weight, bits)
    assert codes.dtype == torch.int8 and scales.dtype == torch.bfloat16 and scales.shape == (3, 2)
    for group, found, scale in zip(weight.reshape(-1, 32), codes.reshape(-1, 32), scales.flatten(), strict=True):
        errors = {}
        for reach in REACHES[bits]:
            step = (group.abs().max() * (reach / highest)).clamp(min=1e-12).bfloat16()
            nearest = (group / step.float()).round().clamp(lowest, highest)
            errors[step.item()] = ((nearest * step.float() - group) ** 2).sum().item()
        missed = ((found * scale.float() - group) ** 2).sum().item()
        assert scale.item() in errors and missed <= min(errors.values()) * (1 + 1e-5)


def test_decoded_is_code_times_scale() -> None:
    codes, scales = torch.randint(-8, 8, (2, 64), dtype=torch.int8), torch.rand(2, 2).bfloat16()
    expected = [[codes[i, j].item() * scales[i, j // 32].item() for j in range(64)] for i in range(2)]
    assert torch.equal(decoded(codes, scales), torch.tensor(expected))


def test_only_experts_are_quantized_and_all_is_bf16() -> None:
    masters = initial(model_config(TINY), 0)
    plain, quantized = (multiplied(masters, torch.float32, bits=bits) for bits in (None, 4))
    assert list(plain) == list(masters) and set(quantized) == set(masters)
    for name, master in masters.items():
        assert torch.equal(plain[name], master.bfloat16().float())
        expected = decoded(*codes_and_scales(master)) if is_expert(name) else plain[name]
        assert torch.equal(quantized[name], expected)
    assert sum(map(is_expert, masters)) == 4
