"""PyTorch's side of `cargo xtask compare`.

Reads one JSON request a line from standard input, answers with one JSON line on standard output.
Tensors travel as safetensors files, read and written here so that nothing but PyTorch is needed.

    {"do": "load", "op": NAME, "options": {..}, "inputs": PATH}   -> {} or {"lacks": REASON}
    {"do": "run", "repeats": N}                                  -> {"seconds": S}
    {"do": "save", "outputs": PATH}                              -> {}

The first line out is {"peer": NAME AND VERSION} or {"missing": REASON}. `rust` beside this file holds
a worker of the same kind.
"""

import importlib.util
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


def qwen3_training_step(inputs, options):
    """A step of training a Qwen3-style model with ternary weights, written as a user of PyTorch
    would: straight-through projection of each matrix once a step, SDPA, autograd, clipping, fused
    AdamW."""
    vocabulary, width, inside = (options[name] for name in ("vocabulary", "width", "inside"))
    heads, key_heads, size = (options[name] for name in ("heads", "key_heads", "head_size"))
    sequences, length, eps = (options[name] for name in ("sequences", "length", "eps"))
    flat, at = inputs["weights"], 0

    def take(*shape):
        nonlocal at
        count = 1
        for axis in shape:
            count *= axis
        at += count
        return torch.nn.Parameter(flat[at - count : at].reshape(shape).clone())

    embedding = take(vocabulary, width)
    layers = []
    for _ in range(options["layers"]):
        q, kv = heads * size, key_heads * size
        shapes = {"q": (q, width), "k": (kv, width), "v": (kv, width), "o": (width, q)}
        shapes |= {"gate": (inside, width), "up": (inside, width), "down": (width, inside)}
        layers.append({name: take(*shape) for name, shape in shapes.items()})
    matrices = [embedding] + [w for layer in layers for w in layer.values()]
    norms = []
    for layer in layers:
        layer |= {"norm1": take(width), "q_norm": take(size), "k_norm": take(size), "norm2": take(width)}
        norms += [layer[name] for name in ("norm1", "q_norm", "k_norm", "norm2")]
    last_norm = take(width)
    norms.append(last_norm)
    groups = [
        {"params": matrices, "weight_decay": options["weight_decay"]},
        {"params": norms, "weight_decay": 0.0},
    ]
    rate, betas = options["learning_rate"], tuple(options["betas"])
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True)
    frequencies = options["theta"] ** (-torch.arange(0, size, 2).double() / size)
    angles = torch.outer(torch.arange(length).double(), frequencies)
    cos = torch.cat([angles.cos()] * 2, -1).float()
    sin = torch.cat([angles.sin()] * 2, -1).float()
    batch = inputs["tokens"].long().reshape(sequences, length + 1)
    tokens, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def ternary(w):
        groups = w.detach().view(w.shape[0], -1, 128)
        scale = groups.abs().mean(-1, keepdim=True).half().float()
        codes = (groups / scale).round().clamp(-1, 1)
        return w + ((codes * scale).view_as(w) - w.detach())

    def rotate(x):
        half = size // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    def split(x, count):
        return x.view(sequences, length, count, size)

    def run():
        optimizer.zero_grad()
        table = ternary(embedding)
        x = F.embedding(tokens, table)
        for layer in layers:
            h = F.rms_norm(x, (width,), layer["norm1"], eps)
            q = split(F.linear(h, ternary(layer["q"])), heads)
            k = split(F.linear(h, ternary(layer["k"])), key_heads)
            v = split(F.linear(h, ternary(layer["v"])), key_heads)
            q = rotate(F.rms_norm(q, (size,), layer["q_norm"], eps).transpose(1, 2))
            k = rotate(F.rms_norm(k, (size,), layer["k_norm"], eps).transpose(1, 2))
            o = F.scaled_dot_product_attention(
                q, k, v.transpose(1, 2), is_causal=True, enable_gqa=heads != key_heads
            )
            o = o.transpose(1, 2).reshape(sequences, length, heads * size)
            x = x + F.linear(o, ternary(layer["o"]))
            h = F.rms_norm(x, (width,), layer["norm2"], eps)
            gate, up = F.linear(h, ternary(layer["gate"])), F.linear(h, ternary(layer["up"]))
            x = x + F.linear(F.silu(gate) * up, ternary(layer["down"]))
        logits = F.linear(F.rms_norm(x, (width,), last_norm, eps), table)
        loss = F.cross_entropy(logits.view(-1, vocabulary), targets.view(-1))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(matrices + norms, options["clip"])
        optimizer.step()
        return {"loss_and_norm": torch.stack([loss.detach(), norm.detach()])}

    return run


def beam_search(inputs, options):
    """`generate` with a table as the model: row `last token % rows`. Its time is not counted."""
    from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    table = inputs["table"]

    class Table(PreTrainedModel, GenerationMixin):
        config_class = PretrainedConfig

        def __init__(self):
            super().__init__(PretrainedConfig(vocab_size=table.shape[1], is_encoder_decoder=False))
            self.table = torch.nn.Parameter(table, requires_grad=False)

        def prepare_inputs_for_generation(self, input_ids, **_):
            return {"input_ids": input_ids}

        def forward(self, input_ids, **_):
            start = time.perf_counter()
            output = CausalLMOutput(logits=self.table[input_ids[:, -1:] % len(self.table)])
            not_counted.append(time.perf_counter() - start)
            return output

    model = Table()
    config = GenerationConfig(
        **options,
        num_return_sequences=options["num_beams"],
        eos_token_id=1,
        pad_token_id=0,
        do_sample=False,
        use_cache=False,
        return_dict_in_generate=True,
        output_scores=True,
    )

    def run():
        result = model.generate(inputs["prompts"], generation_config=config)
        return {"sequences": result.sequences, "scores": result.sequences_scores}

    return run


# Seconds of a run that are not the operation's.
not_counted = []
# What an operation needs beside PyTorch.
LIBRARIES = {"beam_search": "transformers"}
OPERATIONS = {
    "beam_search": beam_search,
    "sdpa": sdpa,
    "sdpa_backward": sdpa_backward,
    "layer_norm_backward": layer_norm_backward,
    "rms_norm_backward": rms_norm_backward,
    "softmax_topk": softmax_topk,
    "qwen3_training_step": qwen3_training_step,
}


def main():
    torch.set_num_threads(int(sys.argv[1]))
    answer({"peer": f"torch {torch.__version__}"})
    run, outputs = None, None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "load":
            library = LIBRARIES.get(request["op"])
            if library and not importlib.util.find_spec(library):
                answer({"lacks": f"there is no `{library}`; `pip install {library}`"})
                continue
            run = OPERATIONS[request["op"]](read(request["inputs"]), request["options"])
            outputs = None
            answer({})
        elif request["do"] == "run":
            not_counted.clear()
            start = time.perf_counter()
            for _ in range(request["repeats"]):
                outputs = run()
            answer({"seconds": time.perf_counter() - start - sum(not_counted)})
        elif request["do"] == "save":
            write(request["outputs"], outputs)
            answer({})


try:
    main()
except Exception as error:  # The other side prints it; a traceback would only hide it.
    answer({"error": f"{type(error).__name__}: {error}"})
