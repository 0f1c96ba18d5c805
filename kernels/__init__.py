"""What runs attention. The torch references live with the dialect (`kvpass.ir.ops`); fused kernels are to come here."""
