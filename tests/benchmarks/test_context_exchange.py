"""Keys, values and summaries that chips exchange are told from parameters by their axes, and by who asks for them."""

from benchmarks.context_exchange import table

TEXT = """HloModule m

ENTRY %main (k: bf16[1,8,2,4], w: bf16[8,64]) -> bf16[1,64,2,4] {
  %k = bf16[1,8,2,4]{3,2,1,0} parameter(0)
  %w = bf16[8,64]{1,0} parameter(1)
  %p = bf16[64,64]{1,0} all-gather(%w), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %b = (bf16[1,8,2,4]{3,2,1,0}, bf16[8,64]{1,0}) all-reduce(%k, %w), channel_id=2, replica_groups=[1,8]<=[8]
  %c = bf16[1,8,2,4]{3,2,1,0} collective-permute(%k), source_target_pairs={{0,1}}, metadata={op_name="f/dot_general"}
  ROOT %g = bf16[1,64,2,4]{3,2,1,0} all-gather(%k), channel_id=3, replica_groups=[1,8]<=[8], dimensions={1}
}
"""


def test_parameters_are_left_out():
    """1024 bytes of keys are gathered, of which a chip sends seven of eight parts."""
    lines = table(TEXT, 8, 64).splitlines()
    assert [line.split()[:2] for line in lines] == [["all-gather", "1"], ["together", "0.000"]]
    assert lines[-1].endswith(" 14 bytes a token")
