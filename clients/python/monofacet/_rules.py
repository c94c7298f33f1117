"""The options of the validation rules, which the contract's stubs import.

A process can hold one definition of ``buf/validate/validate.proto``. If the application has a
``buf.validate`` package, that one is used and ours stays out of the way; the contract's rules are read the
same by either.
"""

try:
    from buf.validate import validate_pb2  # type: ignore[import-not-found, unused-ignore]
except ImportError:
    from monofacet.v1 import _validate_pb2 as validate_pb2

__all__ = ["validate_pb2"]
