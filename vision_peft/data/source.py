"""What every reader of a classification set offers."""

from __future__ import annotations

from abc import ABC, abstractmethod

from vision_peft.data.records import ImageSplits


class Source(ABC):
    """A classification set on disk or in a package, named in YAML by class_path and init_args.

    The constructor is cheap and only checks that its file or folder exists, so that a wrong path is reported before any weight
    is loaded. `read()` lists the pictures; it decodes none of them.
    """

    @abstractmethod
    def read(self) -> ImageSplits:
        """The set's splits, in an order that depends on the files alone (few-shot draws depend on it).

        Raises:
            UserError: in one line, naming the file and the key, line or picture that is wrong.
        """
