"""What a training minimises: matcher, criterion, mask vectors, distillation."""
