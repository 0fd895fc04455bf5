from quant.bench_linear import measure_linear


def test_a_row_per_format_batch_and_number_of_threads() -> None:
    said: list[str] = []
    head, *rows = measure_linear(2.2, [1], [1, 4], 1, said.append, {"small": (512, 256)})
    assert head["ceiling_gbps"]["1"] > 0
    assert [(row["format"], row["batch"]) for row in rows] == [
        (name, batch) for name in ("bf16", "int8_g32", "int4_g32") for batch in (1, 4)
    ]
    assert all(row["gbps"] > 0 and row["share"] > 0 and row["gweights_s"] > 0 for row in rows)
    assert all(row["rows"] == 512 and row["cols"] == 256 and row["shape"] == "small" for row in rows)
    errors = [row["rel_err"] for row in rows]
    assert errors[0] < errors[2] < errors[4] < 0.12 and len(said) == 3
