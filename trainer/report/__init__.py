"""What a run shows: progress, console, TensorBoard, pictures, `report.html`."""
