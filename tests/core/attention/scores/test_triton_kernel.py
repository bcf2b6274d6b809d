"""The kernel that rebuilds, rotates and scores keys, against the function that does so with torch, in float32.

It runs in Triton's interpreter, in a process of its own: Triton decides at import what its functions are. It is compiled
too, which takes no GPU: the interpreter lets pass what the compiler refuses, and Triton 3.7.1's multiplies bfloat16 as
if it were integers. On a GPU all of it is in tests/gpu.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from lorc_core.attention.scores.choice import CHOICES, MAX_DIFFERENCE, agree, can_fuse, faster, key_scores
from lorc_core.attention.scores.rebuilt import rebuilt_scores
from lorc_core.model.blocks import Partition
from tests.scores import CACHED, CASES, Case, difference, in_float32

pytest.importorskip("triton", reason="Triton is made for Linux alone")

# Of the largest score. Worst of 40 seeds of every case: 7.4e-7 in float32, 6.0e-4 in float16.
BOUNDS = {torch.float32: 3e-6, torch.float16: 2.4e-3}


INTERPRETED = """
import sys, torch
from lorc_core.attention.scores.triton_kernel import fused_scores
cases = torch.load(sys.argv[1], weights_only=False)
torch.save({name: fused_scores(*arguments) for name, arguments in cases.items()}, sys.argv[2])
"""


def interpreted(cases, directory):
    """The kernel's scores of every case."""
    torch.save(cases, directory / "cases.pt")
    command = [sys.executable, "-c", INTERPRETED, str(directory / "cases.pt"), str(directory / "scores.pt")]
    subprocess.run(command, check=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    return torch.load(directory / "scores.pt")


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    return interpreted({name: case.arguments() for name, case in CASES.items()}, tmp_path_factory.mktemp("fused"))


@pytest.mark.parametrize("name", CASES)
def test_fused_scores_are_those_of_rebuilt_and_rotated_keys(name, fused):
    expected = rebuilt_scores(*in_float32(*CASES[name].arguments()))
    assert fused[name].dtype == CASES[name].dtype
    assert difference(fused[name], expected) < BOUNDS[CASES[name].dtype]


@pytest.mark.parametrize("name", ["grouped queries", "half precision"])
def test_the_controls_are_seen(name, fused):
    query, keys = in_float32(*CASES[name].arguments())
    apart = torch.arange(CASES[name].head_dim).view(2, -1).T.flatten()  # pairs of channels half a head apart
    by_head = keys.offset.unflatten(0, (-1, len(apart)))[:, apart].flatten()
    other_pairs = replace(keys, factors=keys.factors.reordered(apart), offset=by_head)
    wrong = {
        "no offset": rebuilt_scores(query, replace(keys, offset=None)),
        "the next slot's turn": rebuilt_scores(query, replace(keys, turns=keys.turns.roll(-1, dims=1))),
        "other pairs": rebuilt_scores(query[..., apart], other_pairs),
    }
    for expected in wrong.values():
        assert difference(fused[name], expected) > 0.1


def compiled(case, capability):
    """The kernel for a GPU of that compute capability: what each step of the compiler made of it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lorc_core.attention.scores.triton_kernel import kernel_arguments, score_kernel

    query, keys = case.arguments()
    arguments, constants = kernel_arguments(query, keys, query.new_empty(*query.shape[:3], CACHED))
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    names = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}
    signature, known, facts = dict.fromkeys(constants, "constexpr"), dict(constants), {}
    for position, (name, given) in enumerate(zip(score_kernel.arg_names, arguments, strict=False)):
        if given is None or (isinstance(given, int) and given == 1):  # Triton compiles for these
            signature[name], known[name] = "constexpr", given
            continue
        signature[name] = "i32" if isinstance(given, int) else names[given.dtype]
        if not isinstance(given, int) or given % 16 == 0:
            facts[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(score_kernel, signature, known, facts)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernel_compiles_to_tensor_cores_but_for_float32(capability, dtype, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assembly = compiled(Case(head_dim=128, ranks=(512,), num_turned=32, dtype=dtype), capability)["ptx"]
    products = "wgmma.mma_async" if capability == 90 else "mma.sync"
    assert (products in assembly) == (dtype != torch.float32)


def test_latents_are_copied_sixteen_bytes_at_a_time_where_ranks_allow_it(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    case = Case(num_kv_heads=4, num_heads=8, head_dim=64, block="group(2)", ranks=(96, 32), dtype=torch.bfloat16)
    of_sixteen_bytes = "cp.async.cg.shared.global"
    assert of_sixteen_bytes in compiled(case, 80)["ptx"]
    assert of_sixteen_bytes not in compiled(replace(case, ranks=(95, 31)), 80)["ptx"]


def test_places_in_a_cache_are_counted_in_64_bits(tmp_path, monkeypatch):
    """The products of a row and of slots with their strides; a cache may hold more than 2^31 floats."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    code = compiled(Case(), 80)["ttir"]
    products = [line.rsplit(" : ", 1)[1].split(" loc")[0] for line in code.splitlines() if "arith.muli" in line]
    assert products.count("i64") > 1  # the row's, beside that of a tile's first slot
    assert products.count("tensor<64x1xi64>") >= 1
    assert not [product for product in products if product.startswith("tensor<64x1xi32")]


@torch.no_grad()
def test_what_the_kernel_does_not_know_is_left_to_torch():
    query, keys = Case().arguments()
    assert can_fuse(query, keys)
    frequency = replace(keys.factors, partition=Partition("frequency", 2, 20))
    doubles = replace(keys, latents=keys.latents.double(), factors=keys.factors.to("cpu", torch.float64))
    for refused in (
        (query, replace(keys, factors=frequency)),
        (query.double(), doubles),
        (query.half(), keys),
        (query, replace(keys, factors=keys.factors.to("cpu", torch.float16))),
        (query, replace(keys, turns=keys.turns.to(torch.complex128))),
        (query, keys.part(slice(0))),
        Case(head_dim=258, num_turned=2).arguments(),
        Case(head_dim=9, num_turned=2).arguments(),
    ):
        assert not can_fuse(*refused)


@torch.no_grad()
def test_what_may_not_fuse_now():
    given = Case().arguments()
    assert can_fuse(*given)
    with torch.enable_grad():
        assert not can_fuse(*given)
    torch.use_deterministic_algorithms(True)
    try:
        assert not can_fuse(*given)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("high")
    try:
        assert not can_fuse(*given)
        assert can_fuse(*Case(dtype=torch.bfloat16).arguments())
    finally:
        torch.set_float32_matmul_precision("highest")


@torch.no_grad()
def test_on_a_cpu_the_kernel_does_not_serve():
    query, keys = Case().arguments()
    assert torch.equal(key_scores(query, keys, None), rebuilt_scores(query, keys))
    assert CHOICES == {}


def also_torch(query, keys):
    return rebuilt_scores(query, keys)


@pytest.mark.parametrize(("fused_ms", "serves"), [(1.0, also_torch), (3.0, rebuilt_scores)])
def test_the_faster_of_two_that_agree_serves(fused_ms, serves):
    times = {also_torch: fused_ms, rebuilt_scores: 2.0}
    assert faster(*Case().arguments(), also_torch, lambda scores, query, keys: times[scores]) is serves


def test_a_kernel_that_differs_or_does_not_run_is_a_warning_and_torch_serves():
    from triton.runtime.errors import OutOfResources

    def wrong(query, keys):
        return rebuilt_scores(query, keys).roll(1)

    def too_large(query, keys):
        raise OutOfResources(200, 100, "shared memory")

    for kernel, why in ((wrong, "differ"), (too_large, "shared memory")):
        with pytest.warns(UserWarning, match=why):
            assert faster(*Case().arguments(), kernel, lambda *given: 1.0) is rebuilt_scores


@pytest.mark.parametrize("dtype", MAX_DIFFERENCE)
def test_scores_agree_but_for_rounding_where_they_are_numbers(dtype):
    scores = torch.arange(1, 9).to(dtype).view(1, 2, 1, 4)
    masked = scores.where(scores != 3, torch.nan)
    assert agree(scores, scores)
    assert agree(scores * (1 + MAX_DIFFERENCE[dtype] / 2), scores)
    assert agree(0 * scores, 0 * scores)  # of a cache that holds nothing yet
    assert agree(masked, masked)
    for wrong in (
        scores.roll(1),
        scores * (1 + 2 * MAX_DIFFERENCE[dtype]),
        masked,
        scores.where(scores != 3, torch.inf),
    ):
        assert not agree(wrong, scores)
