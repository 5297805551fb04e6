import torch,time,sys
sys.path[:0]=['.','kernels']
from hqqtrain.quant import *
import hqqtrain_kernels as K
def eq(a,b): return all(torch.equal(x.cpu().contiguous().view(torch.uint8),y.cpu().contiguous().view(torch.uint8)) for x,y in ((a.W_q,b.W_q),(a.scale,b.scale),(a.zero,b.zero)))
torch.manual_seed(0)
W=torch.randn(512,1024)*torch.logspace(-3,.5,512)[torch.randperm(512),None]
Wc=W.cuda()
for sv in SOLVERS:
  for nb in (8,4,3,2,1):
    for ax in (0,1):
      for g in (8,64,None):
        sp=QuantSpec(nb,g,ax,sv,torch.bfloat16)
        lay=sp.layout(*W.shape); cpu=quantize(W,sp); gpu=quantize(Wc,sp)
        ok=eq(cpu,gpu)
        a,b=(0,1) if lay.units<3 else (lay.units//3,lay.units//3+1)
        rows=torch.cat([Wc[s] for s in lay.rows_of(a,b)])
        sp2=sp if g or ax else QuantSpec(nb,512,0,sv,torch.bfloat16)
        part=quantize(rows,sp2); ok2=eq(part,Quantized(gpu.W_q[a:b],gpu.scale[a:b],gpu.zero[a:b]))
        D1=dequantize(cpu,lay,torch.bfloat16); D2=dequantize(gpu,lay,torch.bfloat16).cpu()
        if not(ok and ok2 and torch.equal(D1,D2)): print('DIFF',sv,nb,ax,g,'cpu==gpu',ok,'slice',ok2,torch.equal(D1,D2), (D1!=D2).float().mean().item())
print('bits checked')
def T(f,n=3):
    f(); torch.cuda.synchronize(); b=9e9
    for _ in range(n):
        a=time.perf_counter(); f(); torch.cuda.synchronize(); b=min(b,time.perf_counter()-a)
    return b*1e3
W=(torch.randn(28672,8192,device='cuda')*.02).bfloat16()
for sv in SOLVERS:
  for nb in (4,2):
    sp=QuantSpec(nb,64,1,sv,torch.bfloat16)
    torch.cuda.reset_peak_memory_stats(); base=torch.cuda.memory_allocated()
    print(sv,nb,'%.0f ms'%T(lambda:quantize(W,sp)),'peak GiB above %.2f'%((torch.cuda.max_memory_allocated()-base)/2**30),flush=True)
for nb in (4,3,2):
  for ax in (0,1):
    sp=QuantSpec(nb,64,ax,'rtn',torch.bfloat16); q=quantize(W,sp); lay=sp.layout(*W.shape)
    torch.cuda.reset_peak_memory_stats(); base=torch.cuda.memory_allocated()
    print('deq',nb,ax,'%.2f ms'%T(lambda:dequantize(q,lay,torch.bfloat16)),'peak %.2f'%((torch.cuda.max_memory_allocated()-base)/2**30),flush=True)
for M in (512,8192):
    sp=QuantSpec(4,64,1,'rtn',torch.bfloat16); q=quantize(W,sp); lay=sp.layout(*W.shape)
    x=torch.randn(M,8192,device='cuda',dtype=torch.bfloat16,requires_grad=True); g=torch.randn(M,28672,device='cuda',dtype=torch.bfloat16)
    lin=torch.nn.Linear(8192,28672,bias=False,device='cuda',dtype=torch.bfloat16).requires_grad_(False)
    print(M,'ours fwd/fwd+bwd %.2f/%.2f'%(T(lambda:K.linear(x,q.W_q,q.scale,q.zero,None,lay)),T(lambda:K.linear(x,q.W_q,q.scale,q.zero,None,lay).backward(g))),'bf16 %.2f/%.2f'%(T(lambda:lin(x)),T(lambda:lin(x).backward(g))))
with torch.autocast('cuda',torch.bfloat16):
    print(K.linear(x.detach().float(),q.W_q,q.scale,q.zero,None,lay).dtype)
f=torch.compile(lambda x:K.linear(x,q.W_q,q.scale,q.zero,None,lay).relu(),fullgraph=True,dynamic=True)
for M in (2,64): f(torch.randn(M,8192,device='cuda',dtype=torch.bfloat16,requires_grad=True)).sum().backward()
print('compiled ok',torch.__version__)
