"""Shell completion: a short script asks for candidates at each press of Tab. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastcifar.settings import Setting, settings_of

SCRIPTS = {
    "bash": r"""_fastcifar() {
    local IFS=$'\n'
    COMPREPLY=($(fastcifar completion bash -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _fastcifar fastcifar""",
    "zsh": r"""_fastcifar() {
    local -a candidates=("${(@f)$(fastcifar completion zsh -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n $candidates ]]; then compadd -a candidates; else _files; fi
}
compdef _fastcifar fastcifar""",
    "fish": r"""function __fastcifar
    set -l words (commandline -opc) (commandline -ct)
    set -l candidates (fastcifar completion fish -- $words[2..] 2>/dev/null)
    if set -q candidates[1]
        printf '%s\n' $candidates
    else
        __fish_complete_path (commandline -ct)
    end
end
complete -c fastcifar -f -a '(__fastcifar)'""",
}
"""The scripts by shell. Each completes file names where there are no candidates."""


def candidates(words: Sequence[str], commands: Mapping[str, type]) -> list[str]:
    """The completions (commands, flags, names) of the last of `words`; none where any value or file will do.

    `words` are those of a line after `fastcifar`; the last may be empty. Bash makes a word of its own of the `=` in
    `--flag=value`.
    """
    *before, last = [word for word in words[:-1] if word != "="] + [words[-1].removeprefix("=")]
    if not before:
        return [name for name in commands if name.startswith(last)]
    known = list(settings_of(commands[before[0]])) if before[0] in commands else []
    flag, equals, _ = last.partition("=")
    if equals:
        return [text for name in names_after([flag], known) if (text := f"{flag}={name}").startswith(last)]
    names = flags_of(known) if last.startswith("-") else names_after(before[1:], known)
    return [name for name in names if name.startswith(last)]


def names_after(words: Sequence[str], known: Sequence[Setting]) -> Sequence[str]:
    """The names that may follow `words`: values of an open flag, positional values, or else flags."""
    for count, word in enumerate(reversed(words)):
        if word.startswith("-"):
            for setting in known:
                if word in setting.flags and setting.kind is not bool and (setting.many or count == 0):
                    return setting.names
            break
    places = [setting for setting in known if setting.positional]
    return places[0].names if places else flags_of(known)


def flags_of(known: Sequence[Setting]) -> list[str]:
    return [flag for setting in known for flag in setting.flags]
