"""`dispatcher completion`: the script that lets a shell complete verbs and options."""

import click
from click.shell_completion import ShellComplete, get_completion_class

PROGRAM = "dispatcher"
VARIABLE = "_DISPATCHER_COMPLETE"  # as click derives it from the program's name


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes verbs and options in SHELL.

    \b
    bash   dispatcher completion bash > ~/.local/share/bash-completion/completions/dispatcher
    zsh    dispatcher completion zsh > ~/.zfunc/_dispatcher     (with ~/.zfunc in fpath before compinit)
    fish   dispatcher completion fish > ~/.config/fish/completions/dispatcher.fish

    Or for this shell only: eval "$(dispatcher completion bash)"
    """
    kind = get_completion_class(shell)
    assert kind is not None
    # Not the class's own source(): bash's would start a bash to ask for its version.
    click.echo(ShellComplete.source(kind(context.find_root().command, {}, PROGRAM, VARIABLE)))
