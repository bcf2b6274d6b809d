"""Random matrices, made-up spectra, and what every schedule promises for them."""

import re

import torch
from hypothesis import strategies as st

from lorc_core.errors import ConfigError
from lorc_core.model.blocks import Partition
from lorc_core.model.kinds import KINDS
from lorc_core.ranks.spectra import KindSpectrum, LayerSpectrum

BLOCKS = ["joint", "group(2)", "head", "frequency"]


def random_matrix(rows, columns, seed):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def joint(width):
    return Partition("joint", 1, width)


def spectra(*log_conditions, width=128):
    """Layers of joint blocks with these condition numbers, whose energies nobody asks for."""
    return [LayerSpectrum(*(KindSpectrum(joint(width), value) for value in pair)) for pair in log_conditions]


def block_spectra(blocks, data):
    """Layers with random energies in their blocks, 4 kv heads of 8 channels."""
    layers = []
    for pair in blocks:
        kinds = []
        for block in pair:
            partition = Partition(block, 4, 8)
            width = partition.width // partition.rank_step
            energies = tuple(
                tuple(
                    value
                    for value in sorted(data.draw(st.lists(st.floats(0, 9), min_size=width, max_size=width)))[::-1]
                    for _ in range(partition.rank_step)
                )
                for _ in range(partition.num_blocks)
            )
            kinds.append(KindSpectrum(partition, data.draw(st.floats(0, 9)), energies, energies, energies))
        layers.append(LayerSpectrum(*kinds))
    return layers


def check_meets_target(schedule, layers, kept, probes):
    """The kept fraction is within 0.01 or one rank step, or the error says a reach that leaves the target out."""
    try:
        found = schedule.ranks(layers, kept, probes)
    except ConfigError as error:
        least, most = map(float, re.search(r"reachable is ([\d.]+)\.\.([\d.]+)", str(error)).groups())
        assert kept < least - 0.009 or kept > most + 0.009
        return None
    steps = []
    for idx, (layer, ranks) in enumerate(zip(layers, found.layers, strict=True)):
        for kind in KINDS:
            partition, chosen = layer[kind].partition, ranks[kind]
            assert len(chosen) == partition.num_blocks
            assert sum(chosen) >= 1
            if idx in schedule.skip_layers:
                assert set(chosen) == {partition.width}
                continue
            for rank in chosen:
                assert 0 <= rank <= partition.width
                assert rank == partition.width or (rank % schedule.rank_multiple == rank % partition.rank_step == 0)
            assert not partition.equal_ranks or len(set(chosen)) == 1
            together = partition.num_blocks if partition.equal_ranks else 1
            step = min(schedule.rank_multiple * partition.rank_step, partition.width)
            steps.append(step * together / layer.kv_width)
    assert abs(found.kept_fraction - kept) <= max(0.01, *steps) + 1e-9
    return found
