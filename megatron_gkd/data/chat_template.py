"""The chat template of a folder: conversations -> texts.

Templates are programs from the folder, rendered by transformers in its sandbox.
"""

import re
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from megatron_gkd.data.conversation import Messages, RenderOptions
from megatron_gkd.errors import RowError

_MAY_BE_LEFT_OUT = ("tool_calls", "reasoning_content")


class Conversation(NamedTuple):
    """What a template is given. It ends with an assistant turn, unless its response
    is still to be written."""

    messages: Messages
    options: RenderOptions = RenderOptions()
    prompt_only: bool = False
    """Whether the ids of the last response are not wanted"""


class ChatTemplate:
    """The chat template of a tokenizer, from the model folder `folder`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, folder: str):
        self._tokenizer = tokenizer
        self.folder = folder
        self._added_tokens = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._named_by_template: dict[tuple[str, bool], bool] = {}

    def render(
        self, messages: Messages, options: RenderOptions, *, add_generation_prompt: bool = False
    ) -> str:
        """Raises RowError if the template refuses the conversation."""
        return self.render_all([messages], options, add_generation_prompt)[0]

    def render_all(
        self, conversations: list[Messages], options: RenderOptions, add_generation_prompt: bool
    ) -> list[str]:
        """Several conversations of the same options. Raises the RowError of the first."""
        try:
            return self._tokenizer.apply_chat_template(
                conversations,
                tools=options.tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **options.variables,
            )
        except Exception as error:  # a template is a program and may raise any error
            raise RowError(
                f"the chat template of {self.folder} refuses the conversation: {error}"
            ) from error

    def check_renders(self, messages: Messages, options: RenderOptions) -> None:
        """Raises RowError for a variable, for tools, their calls or reasoning that the template
        does not even name: it would leave them out without a word.
        """
        of_turns = {name for turn in messages for name in _MAY_BE_LEFT_OUT if turn.get(name)}
        tools = ["tools"] if options.tools else []
        for name in [*options.variables, *tools, *sorted(of_turns)]:
            key = (name, bool(tools))
            if key not in self._named_by_template:
                template = self._tokenizer.get_chat_template(tools=options.tools)
                found = re.search(rf"\b{re.escape(name)}\b", template)
                self._named_by_template[key] = found is not None
            if not self._named_by_template[key]:
                raise RowError(
                    f"the chat template of {self.folder} never names `{name}` and would leave it "
                    "out: do so, or give --chat_template FILE"
                )

    def closing(self, after: str) -> str:
        """The closing token and the space before it, out of the text after a turn's content; "" if
        there is none.
        """
        bare = after.lstrip()
        space = after[: len(after) - len(bare)]
        for token in self._added_tokens:
            if bare.startswith(token):
                return space + token
        return after.split("\n")[0].rstrip()
