"""PyTorch's side of `cargo xtask compare`.

Reads one JSON request a line from standard input, answers with one JSON line on standard output.
Tensors travel as safetensors files, read and written here so that nothing but PyTorch is needed.

    {"do": "load", "op": NAME, "options": {..}, "inputs": PATH}   -> {}
    {"do": "run", "repeats": N}                                  -> {"seconds": S}
    {"do": "save", "outputs": PATH}                              -> {}

The first line out is {"torch": VERSION} or {"missing": REASON}.
"""

import json
import sys
import time

# Whatever a library prints must not end up among the answers.
answers, sys.stdout = sys.stdout, sys.stderr


def answer(message):
    answers.write(json.dumps(message) + "\n")
    answers.flush()


try:
    import torch
    import torch.nn.functional as F
except ImportError as error:
    answer({"missing": str(error)})
    sys.exit(0)

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read(path):
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
        tensors = {}
        for name, info in header.items():
            if name == "__metadata__":
                continue
            begin, end = info["data_offsets"]
            file.seek(start + begin)
            data = bytearray(file.read(end - begin))
            tensor = torch.frombuffer(data, dtype=DTYPES[info["dtype"]])
            # The copy is aligned as PyTorch aligns its own tensors.
            tensors[name] = tensor.reshape(info["shape"]).clone()
        return tensors


def write(path, tensors):
    header, blobs, at = {}, [], 0
    for name, tensor in tensors.items():
        raw = tensor.detach().contiguous().view(torch.uint8).flatten()
        blob = bytearray(raw.numel())
        torch.frombuffer(blob, dtype=torch.uint8).copy_(raw)
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(blob)],
        }
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(blobs)


# Each operation: (inputs, options) -> a function that runs once and returns its outputs.


def sdpa(inputs, options):
    q, k, v = inputs["q"], inputs["k"], inputs["v"]
    causal, grouped = options["causal"], q.shape[1] != k.shape[1]

    @torch.no_grad()
    def run():
        o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
        return {"o": o}

    return run


def sdpa_backward(inputs, options):
    """The backward pass alone: the forward pass runs once, here."""
    q, k, v = (inputs[name].requires_grad_() for name in "qkv")
    causal, grouped = options["causal"], q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)

    def run():
        gradients = torch.autograd.grad(o, (q, k, v), inputs["do"], retain_graph=True)
        return dict(zip(("dq", "dk", "dv"), gradients))

    return run


def layer_norm_backward(inputs, options):
    """The backward pass alone: the forward pass runs once, here."""
    x, gamma = (inputs[name].requires_grad_() for name in ("x", "gamma"))
    beta = torch.zeros_like(gamma, requires_grad=True)
    y = F.layer_norm(x, gamma.shape, gamma, beta, options["eps"])

    def run():
        gradients = torch.autograd.grad(y, (x, gamma, beta), inputs["dy"], retain_graph=True)
        return dict(zip(("dx", "dgamma", "dbeta"), gradients))

    return run


def rms_norm_backward(inputs, options):
    """The backward pass alone: the forward pass runs once, here."""
    x, gamma = (inputs[name].requires_grad_() for name in ("x", "gamma"))
    y = F.rms_norm(x, gamma.shape, gamma, options["eps"])

    def run():
        gradients = torch.autograd.grad(y, (x, gamma), inputs["dy"], retain_graph=True)
        return dict(zip(("dx", "dgamma"), gradients))

    return run


def softmax_topk(inputs, options):
    logits, k = inputs["logits"], options["k"]

    @torch.no_grad()
    def run():
        probs, indices = torch.topk(torch.softmax(logits, dim=-1), k, dim=-1)
        return {"probs": probs, "indices": indices}

    return run


OPERATIONS = {
    "sdpa": sdpa,
    "sdpa_backward": sdpa_backward,
    "layer_norm_backward": layer_norm_backward,
    "rms_norm_backward": rms_norm_backward,
    "softmax_topk": softmax_topk,
}


def main():
    torch.set_num_threads(int(sys.argv[1]))
    answer({"torch": torch.__version__})
    run, outputs = None, None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "load":
            run = OPERATIONS[request["op"]](read(request["inputs"]), request["options"])
            outputs = None
            answer({})
        elif request["do"] == "run":
            start = time.perf_counter()
            for _ in range(request["repeats"]):
                outputs = run()
            answer({"seconds": time.perf_counter() - start})
        elif request["do"] == "save":
            write(request["outputs"], outputs)
            answer({})


try:
    main()
except Exception as error:  # The other side prints it; a traceback would only hide it.
    answer({"error": f"{type(error).__name__}: {error}"})
