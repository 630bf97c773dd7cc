//go:build gc && !purego && !race && !asan && !msan

#include "textflag.h"

// The bytes are read as numbers of 64 bits, four to a register. Y0 and Y1 add them up,
// and the carries are lost; Y2 and Y3 add up their upper halves, and nothing is lost.
// From the sum of all, that of the upper halves, in its place, is taken away in the
// end. What is left is the sum of the lower halves, which is below 1<<64: the lost
// carries do not matter. That is three instructions for each 32 bytes, where to add
// both halves by themselves takes four.

// ADD4 adds Y4 to Y7.
#define ADD4 \
	VPADDQ Y4, Y0, Y0; \
	VPADDQ Y5, Y1, Y1; \
	VPADDQ Y6, Y0, Y0; \
	VPADDQ Y7, Y1, Y1; \
	VPSRLQ $32, Y4, Y4; \
	VPSRLQ $32, Y5, Y5; \
	VPSRLQ $32, Y6, Y6; \
	VPSRLQ $32, Y7, Y7; \
	VPADDQ Y4, Y2, Y2; \
	VPADDQ Y5, Y3, Y3; \
	VPADDQ Y6, Y2, Y2; \
	VPADDQ Y7, Y3, Y3

// ADD1 adds Y4.
#define ADD1 \
	VPADDQ Y4, Y0, Y0; \
	VPSRLQ $32, Y4, Y4; \
	VPADDQ Y4, Y2, Y2

// CLEAR begins with nothing.
#define CLEAR \
	VPXOR Y0, Y0, Y0; \
	VPXOR Y1, Y1, Y1; \
	VPXOR Y2, Y2, Y2; \
	VPXOR Y3, Y3, Y3

// LOAD4 reads 128 bytes at SI.
#define LOAD4 \
	VMOVDQU (SI), Y4; \
	VMOVDQU 32(SI), Y5; \
	VMOVDQU 64(SI), Y6; \
	VMOVDQU 96(SI), Y7

// TOTAL adds the lower halves, the upper halves and the lanes up in AX.
#define TOTAL \
	VPADDQ Y1, Y0, Y0; \
	VPADDQ Y3, Y2, Y2; \
	VPSLLQ $32, Y2, Y1; \
	VPSUBQ Y1, Y0, Y0; \
	VPADDQ Y2, Y0, Y0; \
	VEXTRACTI128 $1, Y0, X1; \
	VPADDQ X1, X0, X0; \
	VPSRLDQ $8, X0, X1; \
	VPADDQ X1, X0, X0; \
	VMOVQ X0, AX; \
	VZEROUPPER

// func sumAVX2(p *byte, n int) uint64
TEXT ·sumAVX2(SB), NOSPLIT, $0-24
	MOVQ p+0(FP), SI
	MOVQ n+8(FP), CX
	CLEAR
	SUBQ $128, CX
	JB few
	PCALIGN $32
next:
	LOAD4
	ADD4
	ADDQ $128, SI
	SUBQ $128, CX
	JAE next
few:
	ADDQ $96, CX
	JNC done
one:
	VMOVDQU (SI), Y4
	ADD1
	ADDQ $32, SI
	SUBQ $32, CX
	JAE one
done:
	TOTAL
	MOVQ AX, ret+16(FP)
	RET

// func copyAVX2(dst, src *byte, n int) uint64
TEXT ·copyAVX2(SB), NOSPLIT, $0-32
	MOVQ dst+0(FP), DI
	MOVQ src+8(FP), SI
	MOVQ n+16(FP), CX
	CLEAR
	SUBQ $128, CX
	JB few
	PCALIGN $32
next:
	LOAD4
	VMOVDQU Y4, (DI)
	VMOVDQU Y5, 32(DI)
	VMOVDQU Y6, 64(DI)
	VMOVDQU Y7, 96(DI)
	ADD4
	ADDQ $128, SI
	ADDQ $128, DI
	SUBQ $128, CX
	JAE next
few:
	ADDQ $96, CX
	JNC done
one:
	VMOVDQU (SI), Y4
	VMOVDQU Y4, (DI)
	ADD1
	ADDQ $32, SI
	ADDQ $32, DI
	SUBQ $32, CX
	JAE one
done:
	TOTAL
	MOVQ AX, ret+24(FP)
	RET

// func cpuid(leaf, sub uint32) (eax, ebx, ecx, edx uint32)
TEXT ·cpuid(SB), NOSPLIT, $0-24
	MOVL leaf+0(FP), AX
	MOVL sub+4(FP), CX
	CPUID
	MOVL AX, eax+8(FP)
	MOVL BX, ebx+12(FP)
	MOVL CX, ecx+16(FP)
	MOVL DX, edx+20(FP)
	RET

// func xgetbv() (eax, edx uint32)
TEXT ·xgetbv(SB), NOSPLIT, $0-8
	MOVL $0, CX
	XGETBV
	MOVL AX, eax+0(FP)
	MOVL DX, edx+4(FP)
	RET
