"""Methods that are put on a single object, without a reference back from them: `del model` must free it at once."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any


class WeakMethod:
    """A function bound to an object that it does not keep alive. Attributes are those of a bound method."""

    def __init__(self, function: Callable[..., Any], instance: Any) -> None:
        self.__func__, self._instance = function, weakref.ref(instance)
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    @property
    def __self__(self) -> Any:
        instance = self._instance()
        if instance is None:
            raise ReferenceError(f"the object that {self.__name__} belongs to is gone: keep it for the call")
        return instance

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.__func__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeakMethod":
        # The instance is being copied, or this is a copy of the method alone.
        return WeakMethod(self.__func__, memo.get(id(self.__self__), self.__self__))

    def __reduce__(self) -> tuple[Any, ...]:
        # As a bound method: what is unpickled has the method of its class.
        return getattr, (self.__self__, self.__name__)
