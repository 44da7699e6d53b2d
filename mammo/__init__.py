"""The library below the published modules, in rooms that import only those to their left:

base < images < data, train < maps < evaluate; phantom uses base, images and data. Commands use them all.
"""

from mammo.base import guards  # noqa: F401  sets OpenCV's limit of pixels before anything imports OpenCV

__version__ = "0.2.0"
