# SPDX-License-Identifier: Apache-2.0
"""llama.cpp through llama-cpp-python, its weights written out in float32 first.

Shape: model (a GGUF file), scratch, prompts (ids). Options: new_tokens, threads. One
"step" answers all prompts, one after another: this package's server takes one at a
time. Invariants: no end id; what was there of a prompt is forgotten before each.
Raises: through line.serve.
"""

from __future__ import annotations

import pathlib

import line


def in_float32(source: str, target: pathlib.Path) -> str:
    """The same model with every tensor in float32."""
    import gguf

    reader = gguf.GGUFReader(source)
    architecture = reader.get_field("general.architecture").contents()
    writer = gguf.GGUFWriter(str(target), architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        value = 0 if name == "general.file_type" else field.contents()
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, kind, inner)
    for tensor in reader.tensors:
        data = gguf.dequantize(tensor.data, tensor.tensor_type).astype("float32")
        writer.add_tensor(
            tensor.name, data.reshape(tuple(map(int, tensor.shape))[::-1])
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(target)


def build(shape: dict, options: dict):
    """Load the model, answer once, return facts and the stepper."""
    import llama_cpp

    path = pathlib.Path(shape["scratch"]) / "float32.gguf"
    if not path.exists():
        in_float32(shape["model"], path)
    prompts, new = shape["prompts"], options["new_tokens"]
    model = llama_cpp.Llama(
        str(path),
        n_ctx=max(map(len, prompts)) + new + 8,
        n_threads=options["threads"],
        n_threads_batch=options["threads"],
        type_k=llama_cpp.GGML_TYPE_F32,
        type_v=llama_cpp.GGML_TYPE_F32,
        verbose=False,
    )

    def answers():
        found = []
        for prompt in prompts:
            model.reset()
            told = model.generate(prompt, temp=0.0, repeat_penalty=1.0)
            found.append([next(told) for _ in range(new)])
            told.close()
        return found

    def steps(n):
        return [float(len(answers())) for _ in range(n)]

    facts = {
        "ids": answers(),
        "versions": f"llama-cpp-python {llama_cpp.__version__}",
        "setting": f"float32 weights and cache, {options['threads']} threads, one "
        "prompt after another",
    }
    return facts, steps


if __name__ == "__main__":
    line.serve(build)
