"""The class names of COCO, at the rows of the released heads: row i is category id i."""

# 80 names in the order of their ids, which are 1 to 90 without these ten.
GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
# fmt: off
NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat",
    "traffic light", "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog",
    "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella",
    "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange",
    "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant",
    "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors",
    "teddy bear", "hair drier", "toothbrush",
)
# fmt: on
_IDS = [category for category in range(1, 91) if category not in GAPS]
_NAME_OF = dict(zip(_IDS, NAMES, strict=True))
COCO_ROWS = tuple(_NAME_OF.get(row, f"unused {row}") for row in range(91))
