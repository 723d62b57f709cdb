"""The ledger of replaced samples."""

from softmoe_clip.data_pipelines.ledger import Replacement, append_replaced, cut_back_ledger, read_ledger

ENTRY = Replacement(5, "000000001", "00000.tar", "no caption", "000000002")


def test_entries_come_back_and_nothing_makes_no_file(tmp_path):
    file = tmp_path / "skipped.jsonl"
    append_replaced(file, [], step=1)
    assert not file.exists()
    assert read_ledger(file) == []
    append_replaced(file, [ENTRY, ENTRY._replace(reason="é 猫")], step=1)
    append_replaced(file, [ENTRY], step=2)
    assert read_ledger(file)[0] == {**ENTRY._asdict(), "step": 1}
    assert [entry["step"] for entry in read_ledger(file)] == [1, 1, 2]


def test_a_key_that_is_no_text_comes_back(tmp_path):
    file, odd = tmp_path / "skipped.jsonl", ENTRY._replace(key="caf\udce9\u2028")
    append_replaced(file, [odd, odd], 1)
    cut_back_ledger(file, 1)
    assert [entry["key"] for entry in read_ledger(file)] == ["caf\udce9\u2028"] * 2


def test_cutting_back_drops_later_steps_and_half_lines(tmp_path):
    file = tmp_path / "skipped.jsonl"
    cut_back_ledger(file, 3)
    for step in range(1, 6):
        append_replaced(file, [ENTRY], step)
    with open(file, "a") as ledger:
        ledger.write('{"position": 7, "ke')
    cut_back_ledger(file, 3)
    append_replaced(file, [ENTRY], 4)
    assert [entry["step"] for entry in read_ledger(file)] == [1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["skipped.jsonl"]


def test_lines_that_a_bad_copy_damaged_are_left_out_and_those_after_them_kept(tmp_path):
    file = tmp_path / "skipped.jsonl"
    append_replaced(file, [ENTRY], 1)
    with open(file, "ab") as ledger:
        ledger.write(b'{"position": 7, "key": "caf\xe9", "step": 2}\n\0\0\0\n7\n')
    append_replaced(file, [ENTRY], 3)
    append_replaced(file, [ENTRY], 4)
    assert [entry["step"] for entry in read_ledger(file)] == [1, 3, 4]
    cut_back_ledger(file, 3)
    assert [entry["step"] for entry in read_ledger(file)] == [1, 3]
