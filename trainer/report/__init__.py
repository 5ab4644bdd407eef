"""What people see of a run: `Progress`, console, TensorBoard, pictures, `report.html`."""
