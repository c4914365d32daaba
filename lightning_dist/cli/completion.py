"""``lightning-dist completion``: complete verbs, config groups, their values and keys on TAB."""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning_dist.cli import VERBS

if TYPE_CHECKING:  # the completion of a verb does not import Hydra
    from omegaconf import DictConfig

_HELP = """Print the script that completes the command lines of lightning-dist in a shell.

  bash, in ~/.bashrc:                    eval "$(lightning-dist completion bash)"
  zsh, in ~/.zshrc, after compinit:      eval "$(lightning-dist completion zsh)"
  fish, in ~/.config/fish/config.fish:   lightning-dist completion fish | source"""

# Each script calls the command with the line up to the cursor, and reads one candidate per line.
_SCRIPTS = {
    # Bash replaces only the text after the last character of COMP_WORDBREAKS, such as "=", so the
    # script removes the text before it from a candidate. The candidate of a complete word ends in a
    # space, because bash 3.2 of macOS has no option that adds the space for some candidates only.
    "bash": r"""_lightning_dist() {
    local line="${COMP_LINE:0:$COMP_POINT}" candidate
    local word="${line##*[[:space:]]}"
    local kept="${word%"${word##*["$COMP_WORDBREAKS"]}"}"
    COMPREPLY=()
    while IFS= read -r candidate; do
        COMPREPLY+=("${candidate#"$kept"}")
    done < <("$1" completion bash "$line" 2>/dev/null)
}
complete -o nospace -o default -F _lightning_dist lightning-dist
""",
    "zsh": r"""_lightning_dist() {
    local -a candidates
    candidates=("${(@f)$("$words[1]" completion zsh \
        "${(j: :)words[1,CURRENT-1]} $PREFIX" 2>/dev/null)}")
    if [[ -z "$candidates" ]]; then
        compset -P '*='
        _files
        return
    fi
    compadd -S '' -- ${(M)candidates:#*[=./]}
    compadd -- ${candidates:#*[=./]}
}
compdef _lightning_dist lightning-dist
""",
    # Fish adds a space after a candidate, except after "=", "." and "/".
    "fish": r"""function __lightning_dist
    set -l program (commandline -opc)[1]
    set -l candidates ($program completion fish (commandline -cp | string collect) 2>/dev/null)
    if test -n "$candidates"
        printf '%s\n' $candidates
        return
    end
    set -l word (commandline -ct)
    set -l key (string match -r '^.*=' -- $word)
    for path in (__fish_complete_path (string replace -r '^.*=' '' -- $word))
        echo "$key"$path
    end
end
complete -c lightning-dist -f -a '(__lightning_dist)'
""",
}


def main() -> None:
    """Print the script for the shell in ``sys.argv``, or the candidates that a script asks for.

    Raises:
        SystemExit: with status 2, if ``sys.argv`` contains no known shell.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-dist completion",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=_SCRIPTS)
    parser.add_argument("line", nargs="?", help=argparse.SUPPRESS)  # up to the cursor
    options = parser.parse_args(sys.argv[2:])
    if options.line is None:
        print(_SCRIPTS[options.shell], end="")
        return
    for candidate in complete(options.line):
        unfinished = candidate.endswith(("=", ".", "/"))
        print(candidate if unfinished or options.shell != "bash" else f"{candidate} ")


def complete(line: str) -> list[str]:
    """Return the words that can replace the last word of a command line.

    Args:
        line: the command line from the name of the program up to the cursor. After a space, the
            last word is empty.

    Returns:
        The words, sorted. A word that ends in ``=``, ``.`` or ``/`` is not complete. The list is
        empty if only the shell can complete the word, as a file name, or if a quote is not closed.
    """
    try:
        _, *words = shlex.split(line)
    except ValueError:
        return []
    word = words.pop() if words and not line[-1].isspace() else ""
    if not words:
        return sorted(x for x in [*VERBS, "--help", "--version"] if _fits(x, word))
    verb, *overrides = words
    if verb == "completion":
        return sorted(shell for shell in _SCRIPTS if _fits(shell, word) and not overrides)
    if verb in ("card", "report") or verb not in VERBS:
        return []
    return _Candidates(verb, overrides).of(word)


def _fits(candidate: str, word: str) -> bool:
    """Return whether a candidate starts with a word; an option never matches an empty word."""
    return candidate.startswith(word) and (word != "" or not candidate.startswith("-"))


class _Candidates:
    """Complete an override of a verb from its config, which is composed with the earlier words.

    Hydra 1.3 has its own completion, and this class uses its search for keys. But Hydra completes
    no value in a folder of a group (``experiment=cifar100/...``) or after a comma, and no key after
    ``~`` or ``++``, and it offers groups that the verb does not have.

    Args:
        verb: the verb, whose config has the same name.
        words: the words of the command line between the verb and the cursor.
    """

    def __init__(self, verb: str, words: Sequence[str]) -> None:
        # Imported here, because the completion of a verb does not need Hydra.
        from hydra._internal.config_loader_impl import ConfigLoaderImpl
        from hydra._internal.utils import create_config_search_path, get_args

        arguments = get_args(words)
        search_path = create_config_search_path("pkg://lightning_dist.conf")
        if arguments.config_dir is not None:
            search_path.append("command-line", f"file://{os.path.abspath(arguments.config_dir)}")
        self.verb = verb
        self.overrides = arguments.overrides
        self.loader = ConfigLoaderImpl(search_path)

    def of(self, word: str) -> list[str]:
        """Return the candidates for a word, sorted."""
        if word.startswith("-"):
            from hydra._internal.utils import get_args_parser

            options = get_args_parser()._option_string_actions
            return sorted(option for option in options if option.startswith(word))
        sign, word = _split(r"\+\+|\+|~|", word)
        found = set(self._values(word) or self._groups_and_keys(sign, word))
        if sign == "~":  # an override that deletes a key needs no value
            found = {candidate.rstrip("=") for candidate in found}
        return sorted(sign + candidate for candidate in found)

    def _values(self, word: str) -> list[str]:
        """Return the configs and folders of a group, also for a value after a comma."""
        from hydra.core.object_type import ObjectType

        start, value = _split(r"[^=]+=(?:.*[\[,])?|", word)
        group = start.partition("=")[0]
        if not group:
            return []
        folder = value[: value.rfind("/") + 1]
        within = f"{group}/{folder}".rstrip("/")
        configs = self.loader.get_group_options(within, ObjectType.CONFIG)
        folders = self.loader.get_group_options(within, ObjectType.GROUP)
        names = [folder + name for name in [*configs, *(f"{name}/" for name in folders)]]
        return [start + name for name in names if name.startswith(value)]

    def _groups_and_keys(self, sign: str, word: str) -> list[str]:
        """Return groups and keys, or the value of a key if the word contains the whole key."""
        from hydra.plugins.completion_plugin import CompletionPlugin
        from hydra.types import RunMode

        # Compose as for a sweep: the line may have values with commas before the user types -m.
        config = self.loader.load_configuration(self.verb, self.overrides, RunMode.MULTIRUN)
        if sign == "+":
            return self._further_groups(config, word)
        keys = CompletionPlugin._get_matches(config, word)
        if "=" in word:  # leave out lists, mappings and missing values
            return [x for x in keys if x != word and not x.endswith(("=", ".")) and " " not in x]
        choices = config.hydra.runtime.choices
        groups = [f"{group}=" for group in choices if group.startswith(word) and "@" not in group]
        if not word.startswith("hydra/"):
            groups = ["hydra/" if x.startswith("hydra/") else x for x in groups]
        return keys if sign == "++" else [*groups, *keys]

    def _further_groups(self, config: "DictConfig", word: str) -> list[str]:
        """Return the groups from which the config has no choice yet."""
        groups = self.loader.list_groups("")
        choices = config.hydra.runtime.choices
        return [f"{x}=" for x in groups if x.startswith(word) and x not in choices]


def _split(pattern: str, word: str) -> tuple[str, str]:
    """Split a word at the end of the text that a pattern matches at its start."""
    match = re.match(pattern, word)
    end = match.end() if match else 0
    return word[:end], word[end:]
