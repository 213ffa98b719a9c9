"""`python -m trl_grpo_ext`: the same as the command `trl-grpo-ext`."""

from .cli import main


if __name__ == "__main__":
    main()
