"""Files of public measurements: what is read of each, by rows copied from them, and that shipped records are those of the data."""

import os
from pathlib import Path

import pytest

from memsplit.dse import calibrated_sets, measured_sets
from memsplit.dse.cli import main
from memsplit.models import record_for, shipped_records

DATA = os.environ.get("MEMSPLIT_MEASURED", "")

FILES = {
    # ai-dynamo/aiconfigurator, Apache-2.0
    "aic_gemm_a100_sxm.csv": "m,n,k,dtype,measured_s,src\n1,256,768,bf16,4.0711e-06,sglang/0.5.10\n2,256,768,bf16,7.2196e-06,vllm/1\n",
    "aic_gemm_fp8_l40s.csv": "m,n,k,dtype,measured_s,src\n1,256,768,fp8,3.9253e-06,sglang/0.5.14\n",
    "aic_attn_decode_h100_sxm_vllm.csv": "batch,seq,heads,kv_heads,head_dim,kernel,measured_s,phys_ok\n"
    "1,2,2,1,64,fa3,1.0325e-05,1\n1,2,2,1,512,fa3,1.0325e-05,1\n1,2,2,1,64,fa3,1e-06,0\n",
    "aic_nccl.csv": "device,op,dtype,gpus,elements,measured_s\n"
    "a100_sxm,all_gather,half,2,256,8.98e-06\na100_sxm,all_reduce,int8,2,256,9e-06\n",
    # microsoft/vidur, MIT
    "vidur_gemm_a40.csv": "model,op,tp,m,n,k,dtype,measured_s,std_rel\ninternlm-20b,attn_pre_proj,1,4096,15360,5120,fp16,0.00577,0.014\n",
    "vidur_elementwise_a40.csv": "model,op,tp,m,hidden,ffn,dtype,measured_s\nphi-2,mlp_act,1,4096,2560,10240,fp16,0.0002085\n",
    # argonne-lcf/LLM-Inference-Bench, BSD-3
    "argonne_llm_inference_bench.csv": "device,n_gpu,framework,model,in_out_len,batch,latency_s,tok_s,consistent\n"
    "Nvidia A100 GPU,1,vLLM,meta-llama/Llama-2-7b-hf,128,1,2.7285,93.825,1\nIntel Max 1550,1,vLLM,meta-llama/Llama-2-7b-hf,128,1,1,1,1\n",
    "host_link_bandwidth.csv": "source,device,direction,bytes,GBps\nx,Quadro RTX 6000 (PCIe3 x16),h2d_pinned,1000000,10\n",
    "llamacpp_decode.csv": "source,device,n_gpu,mem,bw_peak_GBps,model,model_GiB,phase,tokens,depth,batch,tok_s\n"
    "x,3090 24GB,1,GDDR6,936,LLaMA-3 8B F16,14.96,tg,512,0,1,46.51\n",
    "aic_gemm_b9000.csv": "m,n,k,dtype,measured_s,src\n1,256,768,bf16,4e-06,x\n",
    "notes.csv": "a\n1\n",
}


def written(folder: Path) -> Path:
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def test_each_file_is_the_kernel_device_and_rows_that_it_should_be(tmp_path: Path) -> None:
    sets, unknown = measured_sets(written(tmp_path))
    found = {
        (one.file, one.device.name, one.measurements.model.name, one.measurements.model.variant): (len(one.measurements), one.dropped)
        for one in sets
    }
    assert found == {
        ("aic_attn_decode_h100_sxm_vllm.csv", "H100-SXM", "decode_attention", "vllm"): (1, 2),
        ("aic_gemm_a100_sxm.csv", "A100-SXM-80GB", "gemm", "bf16"): (1, 1),
        ("aic_gemm_fp8_l40s.csv", "L40S", "gemm", "fp8"): (1, 0),
        ("aic_nccl.csv", "A100-SXM-80GB", "all_reduce", "all_gather"): (1, 0),
        ("aic_nccl.csv", "A100-SXM-80GB", "all_reduce", "all_reduce"): (1, 0),
        ("argonne_llm_inference_bench.csv", "A100-SXM-40GB", "serving", "vLLM"): (1, 0),
        ("host_link_bandwidth.csv", "Quadro RTX 6000", "host_link", "h2d_pinned"): (1, 0),
        ("llamacpp_decode.csv", "RTX 3090", "stream", ""): (1, 0),
        ("vidur_elementwise_a40.csv", "A40", "elementwise", ""): (1, 0),
        ("vidur_gemm_a40.csv", "A40", "gemm", "bf16"): (1, 0),
    }
    assert any("there is no device 'b9000'" in sentence for sentence in unknown)
    assert any("notes.csv: no reader knows files of that name" in sentence for sentence in unknown)


def test_what_collectors_wrote_becomes_our_columns(tmp_path: Path) -> None:
    sets, _ = measured_sets(written(tmp_path))
    by_name = {(one.file, one.measurements.model.variant): one.measurements for one in sets}
    assert by_name["host_link_bandwidth.csv", "h2d_pinned"].seconds.tolist() == pytest.approx([1e-4])
    assert by_name["aic_nccl.csv", "all_gather"].shapes["bytes"].tolist() == [512]  # two bytes an element
    assert by_name["aic_nccl.csv", "all_reduce"].shapes["bytes"].tolist() == [256]
    assert by_name["vidur_elementwise_a40.csv", ""].shapes["gated"].tolist() == [0]
    assert by_name["argonne_llm_inference_bench.csv", "vLLM"].seconds.tolist() == [2.7285]
    assert by_name["llamacpp_decode.csv", ""].shapes["state_bytes"].tolist() == [131072 * 256]  # the mean of 512 tokens


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are no CSVs in"):
        measured_sets(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "calibrate needs --out"), (["--device", "a100", "--out", "x"], "--device has no effect on a folder")],
)
def test_the_command_refuses_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["calibrate", str(written(tmp_path)), *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "aic_gemm_a100_sxm.csv",
            "a,b\n1,2\n",
            "aic_gemm_a100_sxm.csv has no column 'src', which files of that name have; rename the file",
        ),
        ("vidur_gemm_a40.csv", "", r"cannot read .*vidur_gemm_a40.csv: .*; mend the file, or leave it out"),
        ("vidur_gemm_a40.csv", "m,n\n1,2\n", "vidur_gemm_a40.csv has no column 'k'"),
        ("vidur_gemm_a40.csv", "m,n,k\n1,2,3\n", "vidur_gemm_a40.csv has no column 'measured_s'"),
        ("vidur_gemm_a40.csv", "m,n,k,measured_s\n1,2,x,4\n", "could not convert string to float: 'x'; correct that"),
        ("vidur_gemm_a40.csv", "m,n,k,measured_s\n1,2,3,0\n", "measured_s must be above 0 and finite"),
        ("aic_gemm_a100_sxm.csv", "m,n,k,dtype,measured_s,src\n1,2,3,bf16,4,5\n", "does not hold what files of that name do"),
        ("llamacpp_decode.csv", FILES["llamacpp_decode.csv"].replace("LLaMA-3", "LLaMA-9"), "does not hold what files of that name do"),
    ],
)
def test_another_file_of_a_known_name_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        measured_sets(tmp_path)


def test_a_folder_of_which_nothing_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.csv").write_text(FILES["notes.csv"])
    assert main(["calibrate", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert f"nothing in {tmp_path} can be fitted; name a folder of public measurements" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "host_link_bandwidth.csv").write_text(FILES["host_link_bandwidth.csv"])
    assert main(["calibrate", str(tmp_path), "--out", str(tmp_path / "notes.csv")]) == 2
    assert "notes.csv: File exists; name another folder with --out" in capsys.readouterr().err


def test_sets_are_told_as_they_begin_and_are_fitted_whole(tmp_path: Path) -> None:
    lines = [f"x,Quadro RTX 6000 (PCIe3 x16),h2d_pinned,{1000 + 100 * size},{size / (size + 50)}" for size in range(1, 6002)]
    (tmp_path / "host_link_bandwidth.csv").write_text("\n".join(["source,device,direction,bytes,GBps", *lines]) + "\n")
    told = list[str]()
    ((_, record),) = calibrated_sets(measured_sets(tmp_path)[0], progress=told.append)
    assert told == ["Quadro RTX 6000 host_link_bandwidth.csv host_link h2d_pinned: 6001 rows"]
    assert record.fitted.rows + record.flagged == 6001


@pytest.mark.skipif(not DATA, reason="MEMSPLIT_MEASURED does not name a folder with measured times")
def test_shipped_records_come_of_the_data_to_the_last_digit() -> None:
    """Those that are fitted within seconds; ``memsplit calibrate FOLDER --out ... --date ...`` makes them all."""
    sets, _ = measured_sets(Path(DATA) / "calibration")
    quick = [
        one for one in sets if one.file in ("aic_nccl.csv", "host_link_bandwidth.csv", "llamacpp_decode.csv", "offload_throughput.csv")
    ]
    for each, record in calibrated_sets(quick, date="2026-11-21"):
        assert record == record_for(each.measurements.model, each.device), f"{record.kernel} {record.variant} on {record.device}"
    assert len(quick) < len(shipped_records())
