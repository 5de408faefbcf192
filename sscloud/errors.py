"""Every error that SSCloud raises on purpose.

    SSCloudError            one line for a person: what was found, what was expected, what to do next
    ├── SchemaError         a label schema is wrong, or a label is not in it
    ├── ImageError          bytes are no picture that can be used: broken, truncated, too large, too small
    ├── BundleError         a bundle or a checkpoint cannot be read or does not fit
    ├── DatasetError        a folder of panoramas and masks cannot be used
    ├── ArchiveError        an exported archive is broken, hostile or of an unknown layout
    ├── ServerError         a CVAT server cannot be reached, refuses, or answers something else than CVAT
    │   └── UnreachableError    no answer at all: the next request would fare no better
    ├── DeployError         Nuclio or one of its functions fails, or does not answer as it should
    ├── RequestError        a request to the function is wrong; answered with status 400
    ├── RegistryError       the store of models cannot be reached, or what it holds cannot be used
    ├── TrainingError       training cannot go on: out of memory, numbers that are no numbers
    ├── CycleError          a step of `sscloud cycle` failed; what served before goes on serving
    └── ConfigError         a setting, a path or a command-line value is wrong

Anything else that escapes is a defect of SSCloud.
"""


class SSCloudError(Exception):
    """Base of all errors with a message for a person."""


class SchemaError(SSCloudError):
    """A label schema is wrong, or a label is not in it."""


class ImageError(SSCloudError):
    """Bytes are no picture that can be used."""


class BundleError(SSCloudError):
    """A bundle or a checkpoint cannot be read or does not fit."""


class DatasetError(SSCloudError):
    """A folder of panoramas and masks cannot be used."""


class ArchiveError(SSCloudError):
    """An exported archive is broken, hostile or of an unknown layout."""


class ServerError(SSCloudError):
    """A CVAT server cannot be reached, refuses, or answers something else than CVAT.

    Args:
        message: for a person.
        status: the HTTP status, None when there was no answer.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class UnreachableError(ServerError):
    """A CVAT server gives no answer at all."""


class DeployError(SSCloudError):
    """Nuclio or one of its functions fails, or does not answer as it should."""


class RequestError(SSCloudError):
    """A request to the function is wrong."""


class RegistryError(SSCloudError):
    """The store of models cannot be reached, refuses, or holds something that cannot be used."""


class TrainingError(SSCloudError):
    """Training cannot go on."""


class CycleError(SSCloudError):
    """A step of a cycle failed; what served before goes on serving."""


class ConfigError(SSCloudError):
    """A setting, a path or a command-line value is wrong."""
