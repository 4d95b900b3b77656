"""The built-in environments and adapters, one per file, registered with Gymnasium when this package is imported."""

import gymnasium

for _id, _entry_point in (
    ("raygym/Arithmetic-v0", "raygym.envs.arithmetic:Arithmetic"),
    ("raygym/Calculator-v0", "raygym.envs.calculator:Calculator"),
    ("raygym/NumberGuess-v0", "raygym.envs.number_guess:NumberGuess"),
    ("raygym/PythonCode-v0", "raygym.envs.python_code:PythonCode"),
    ("raygym/ReasoningGym-v0", "raygym.envs.reasoning_gym:ReasoningGym"),
    ("raygym/TextArena-v0", "raygym.envs.text_arena:TextArena"),
    ("raygym/TextGym-v0", "raygym.envs.text_gym:TextGym"),
    ("raygym/Warehouse-v0", "raygym.envs.warehouse:Warehouse"),
):
    # Gymnasium's own wrappers expect arrays; raygym checks what an environment returns itself.
    gymnasium.register(_id, entry_point=_entry_point, order_enforce=False, disable_env_checker=True)
