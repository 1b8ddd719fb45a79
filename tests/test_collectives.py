"""Collectives are counted where their results arrive, once each."""

from experiments.tools.collectives import Collective, collectives

# As XLA writes programs for TPUs and CPUs, shortened.
TEXT = """
HloModule jit_f, is_scheduled=true, num_partitions=8

%all-to-all.1.reduce_sub_computation (lhs: f32[], rhs: f32[]) -> f32[] {
  ROOT %add.1 = f32[] add(%lhs, %rhs)
}

%body (carry: (s32[], f32[4])) -> (s32[], f32[4]) {
  %all-reduce.9 = (s32[]{:T(128)}, s32[5]{0:T(128)S(1)}) all-reduce(%a, %b), channel_id=9
  ROOT %all-reduce.10 = bf16[2,3]{1,0:T(8,128)(2,1)} all-reduce(%c), to_apply=%add
}

ENTRY %main {
  %all-gather-start.1 = (f32[4,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%p), dimensions={0}
  %all-gather-done.1 = f32[16,8]{1,0:T(8,128)} all-gather-done(%all-gather-start.1)
  all-gather.2 = f8e4m3fn[10]{0} all-gather(p.1), dimensions={0}
  %collective-permute-start.3 = (c64[3]{0}, c64[3]{0}, u32[]{:S(2)}) collective-permute-start(%q)
  %collective-permute-done.3 = c64[3]{0} collective-permute-done(%collective-permute-start.3)
  %all-to-all.2 = pred[4,4,2]{2,1,0:T(4,128)(4,1)S(1)} all-to-all(%x), metadata={op_name="f"}
  %ragged-all-to-all.1 = s4[5]{0} ragged-all-to-all(%x, %y)
  %reduce.495 = f32[4,16]{1,0} reduce(%all-to-all.2), to_apply=%all-to-all.reduce_sub_computation
  %bitcast = f32[64,10]{1,0} bitcast(%all-gather), metadata={op_name="f = g all-gather(x)"}
  ROOT %reduce-scatter = f64[2]{0} reduce-scatter(%z), dimensions={0}
}
"""


def test_each_kind_of_a_program():
    assert collectives(TEXT) == {
        "all-gather": Collective(2, 4 * 16 * 8 + 10),
        "all-reduce": Collective(2, 4 + 4 * 5 + 2 * 6),
        "all-to-all": Collective(1, 32),
        "collective-permute": Collective(1, 24),
        "ragged-all-to-all": Collective(1, 3),
        "reduce-scatter": Collective(1, 16),
    }


def test_a_program_without_any():
    assert collectives("ENTRY %main {\n  ROOT %add = f32[2]{0} add(%all-reduce.1, %y)\n}") == {}
